"""Stable Diffusion checkpoints to Core ML packages, on any machine."""
