"""(batch, channels, 1, length) modules that are put into diffusers' and transformers' own networks.

Parameters keep the checkpoint's names; only the shape of a linear layer's weight changes, to that of a 1x1
convolution (`pointwise`). Programs that are traced with these modules need `teach_coremltools`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.channel_norm import teach_coremltools
from diffusion_convert.networks.transformer import SpatialAttention, SpatialTransformer
from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.families import AttentionKind

__all__ = ["put_attention", "teach_coremltools"]

REPLACEMENTS = {"Transformer2DModel": SpatialTransformer, "Attention": SpatialAttention}

# They hold what REPLACEMENTS would replace, but prepare its inputs for diffusers' own layout.
REFUSED = (
    "DualTransformer2DModel",
    "TransformerTemporalModel",
    "TransformerSpatioTemporalModel",
    "KAttentionBlock",
)


def put_attention(network: nn.Module, kind: AttentionKind) -> None:
    """Replace the transformers and attentions of a UNet, ControlNet or VAE, in place.

    Afterwards ``encoder_hidden_states`` is (batch, width, 1, tokens) and goes into the cross-attentions as it is.
    Raises UnsupportedError, naming the module and what about it, for what is not covered.
    """
    _refuse_conditions(getattr(network, "config", {}))
    _replace(network, kind, "")


def _replace(module: nn.Module, kind: AttentionKind, path: str) -> None:
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        class_name = type(child).__name__
        try:
            if class_name in REFUSED:
                raise UnsupportedError(f"{class_name} is not supported")
            if class_name in REPLACEMENTS:
                setattr(module, name, REPLACEMENTS[class_name](child, ATTENTION[kind]).eval())
                continue
        except UnsupportedError as error:
            raise UnsupportedError(f"{here}: {error}") from error
        _replace(child, kind, here)


def _refuse_conditions(config: Any) -> None:
    """Options of diffusers' UNet that read ``encoder_hidden_states`` in diffusers' layout."""
    for key, values in {
        "encoder_hid_dim_type": ("text_proj", "text_image_proj", "image_proj", "ip_image_proj"),
        "addition_embed_type": ("text", "text_image"),
    }.items():
        if config.get(key) in values:
            raise UnsupportedError(f"{key} {config.get(key)!r} is not supported")
