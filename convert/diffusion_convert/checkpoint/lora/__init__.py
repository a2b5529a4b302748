"""LoRAs and their relatives, fused into a checkpoint's weights: read by any trainer's names (`names`, `settings`,
`file`), matched with the weights that they are for (`places`), computed when a weight is read (`kinds`, `fuse`)."""

from diffusion_convert.checkpoint.lora.fuse import fuse

__all__ = ["fuse"]
