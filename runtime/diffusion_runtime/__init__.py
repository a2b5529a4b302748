"""Runs converted Stable Diffusion models: Core ML on macOS, PyTorch everywhere."""
