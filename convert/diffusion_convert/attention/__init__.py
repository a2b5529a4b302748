"""Attention kinds: pure functions over (batch, channels, 1, length)."""
