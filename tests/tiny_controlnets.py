"""Tiny random ControlNets for the tiny checkpoints: published configuration keys, the widths of their UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import compvis_layout
import tiny_checkpoints
from tiny_checkpoints import SD1_UNET, SD2_UNET, SDXL_UNET

_FROM_UNET = (
    "act_fn",
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "in_channels",
    "layers_per_block",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
)
_PUBLISHED: Mapping[str, Any] = {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.14.0.dev0",
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
_OF_SDXL = (
    "addition_embed_type",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_attention_heads",
    "projection_class_embeddings_input_dim",
    "transformer_layers_per_block",
    "use_linear_projection",
)


def _config(unet: Mapping[str, Any], keys: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {**_PUBLISHED, **{key: unet[key] for key in (*_FROM_UNET, *keys)}, **more}


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "sd1": _config(SD1_UNET),
    "sd2": _config(SD2_UNET, ("use_linear_projection",)),
    "sdxl": _config(
        SDXL_UNET, _OF_SDXL, conditioning_channels=3, global_pool_conditions=False, _diffusers_version="0.20.0.dev0"
    ),
    "sdxl-small": _config(
        SDXL_UNET,
        _OF_SDXL,
        conditioning_channels=3,
        down_block_types=["DownBlock2D"] * 3,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[0, 0, 0],
    ),
    "sdxl-union": _config(
        SDXL_UNET,
        _OF_SDXL,
        _class_name="ControlNetUnionModel",
        conditioning_channels=3,
        global_pool_conditions=False,
        num_control_type=6,
        num_trans_channel=32,
        num_trans_head=8,
        num_trans_layer=1,
        num_proj_channel=32,
    ),
}
"""By the kind of checkpoint that they are for."""


def build(kind: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random ControlNet for a kind of checkpoint (a key of `CONFIGS`) into ``folder``, with no layer
    left at zero, as training leaves none. Returns ``folder``."""
    import diffusers

    config = {**CONFIGS[kind], **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        tensors = {
            name: torch.randn(value.shape) / value[0].numel() ** 0.5
            if not value.any() and value.ndim == 4
            else value
            for name, value in model.state_dict().items()
        }
        tiny_checkpoints.write_network(folder, config, tensors)
    return folder


def to_compvis(folder: Path) -> dict[str, torch.Tensor]:
    """A ControlNet's tensors by the names of the first files (lllyasviel's), without their ``control_model.``."""
    config = compvis_layout.read_config(folder, ".")
    renamed = compvis_layout.unet_tensors(
        compvis_layout.read_weights(folder, "."), {**config, "up_block_types": []}
    )
    return {_compvis_name(name): value for name, value in renamed.items()}


def _compvis_name(name: str) -> str:
    hint = "controlnet_cond_embedding"
    for pattern, replacement in (
        (rf"{hint}\.conv_in\.", "input_hint_block.0."),
        (rf"{hint}\.conv_out\.", "input_hint_block.14."),
        (rf"{hint}\.blocks\.(\d)\.", lambda found: f"input_hint_block.{2 * int(found[1]) + 2}."),
        (r"controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0."),
        (r"controlnet_mid_block\.", "middle_block_out.0."),
    ):
        name = re.sub(pattern, replacement, name)
    return name
