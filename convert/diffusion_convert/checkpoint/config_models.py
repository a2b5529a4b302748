"""What a network's configuration may say, checked where it is read: types, and sizes that can be built.

A network is built without storage, but a million layers are a million objects. A key means the same in every class
that has it, so there is one table of keys. What the libraries' own classes check is left to them; so is what to do
with unknown keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError

MAX_LAYERS = 256
MAX_NUMBER = 2**24
"""Larger than any width, vocabulary or size of a picture."""


Count = Annotated[int, Field(strict=True, ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Field(strict=True, ge=1, le=2**16)]
Channels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=2**15)]
Block = Annotated[int, Field(strict=True, ge=0, le=MAX_LAYERS)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
Names = Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)]


def _whole(least: int, most: int) -> Any:
    return Annotated[int, Field(strict=True, ge=least, le=most)]


_KEYS: Mapping[str, Any] = {
    **dict.fromkeys(("in_channels", "latent_channels", "num_channels", "conditioning_channels"), Channels),
    **dict.fromkeys(("block_out_channels", "conditioning_embedding_out_channels", "neck_hidden_sizes"), Widths),
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), Widths),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_trans_layer", "num_control_type"), Count),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), tuple[Count, ...]),
    **dict.fromkeys(("hidden_size", "intermediate_size", "fusion_hidden_size"), Width),
    **dict.fromkeys(("d_model", "d_kv", "d_ff", "num_heads"), Width),
    **dict.fromkeys(("num_trans_channel", "num_trans_head", "num_proj_channel"), Width),
    **dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), Width),
    **dict.fromkeys(("norm_num_groups", "encoder_hid_dim", "projection_dim"), Width | None),
    **dict.fromkeys(("attention_head_dim", "num_attention_heads"), Width | Widths | None),
    **dict.fromkeys(("down_block_types", "up_block_types"), Names | None),
    **dict.fromkeys(("image_size", "patch_size"), Pixels),
    **dict.fromkeys(("norm_eps", "layer_norm_eps", "layer_norm_epsilon"), Positive),
    **dict.fromkeys(("act_fn", "hidden_act", "feed_forward_proj"), Text),
    **dict.fromkeys(("class_embed_type", "qk_norm"), Text | None),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _whole(-1, MAX_NUMBER) | None),
    **dict.fromkeys(("text_config", "backbone_config"), dict[str, Any] | None),
    "out_channels": Channels | None,
    "layers_per_block": Count | tuple[Count, ...],
    "cross_attention_dim": Width | Widths,
    "downsample_padding": _whole(0, 16),
    "num_class_embeds": _whole(4, MAX_NUMBER) | None,
    "use_linear_projection": Flag | None,
    "sample_size": Pixels | tuple[Pixels, Pixels] | None,
    "controlnet_conditioning_channel_order": Literal["rgb", "bgr"],
    "global_pool_conditions": Flag,
    "pos_embed_max_size": _whole(1, 4096),
    "dual_attention_layers": Annotated[tuple[Block, ...], Field(max_length=MAX_LAYERS)],
    "scaling_factor": Positive | None,
    "shift_factor": Number | None,
    "latents_mean": tuple[Number, ...] | None,
    "latents_std": tuple[Positive, ...] | None,
    "upsampling_scaling_factor": Literal[2],
    "vocab_size": _whole(4, MAX_NUMBER),
    "max_position_embeddings": _whole(8, 4096),
    "relative_attention_num_buckets": _whole(4, 4096),
    "relative_attention_max_distance": _whole(4, 2**16),
}
"""What each key may be, where a configuration has it."""


def _model(keys: Mapping[str, Any]) -> type[BaseModel]:
    settings = ConfigDict(extra="allow", protected_namespaces=())
    fields: dict[str, Any] = {key: (kind, None) for key, kind in keys.items()}
    return create_model("Config", __config__=settings, **fields)


_CONFIG = _model({**_KEYS, "vision_config": _model(_KEYS) | None})

TINY_VAE, _CLIP_TEXT = "AutoencoderTiny", ("CLIPTextModel", "CLIPTextModelWithProjection")
_VAE: Mapping[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
_CONTROLNET: Mapping[str, Any] = {"in_channels": 4, "cross_attention_dim": 1280}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "UNet2DConditionModel": {**_CONTROLNET, "out_channels": 4},
    "ControlNetModel": _CONTROLNET,
    "ControlNetUnionModel": _CONTROLNET,
    "SD3Transformer2DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    },
    "AutoencoderKL": _VAE,
    TINY_VAE: {**_VAE, "scaling_factor": 1.0, "shift_factor": 0.0},
    **{name: {"hidden_size": 512, "vocab_size": 49408} for name in _CLIP_TEXT},
    "T5EncoderModel": {"d_model": 512, "vocab_size": 32128},
    "DPTForDepthEstimation": {"hidden_size": 768},
}
"""Of keys that are read here, the libraries' defaults, which stand for what a configuration leaves out."""


def checked(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``config`` with the class's `DEFAULTS`. Raises CheckpointError, with the first field that is wrong."""
    if wrong := _too_large(config, ""):
        raise CheckpointError(f"{where}: {wrong}")
    if class_name in _CLIP_TEXT:
        config = _text_part(config)
    strict_json.as_model(_CONFIG, dict(config), where, f"a {class_name}", CheckpointError)
    if class_name == TINY_VAE:  # null would be another scale; by the decoder's blocks the size of latents is told
        config = {key: value for key, value in config.items() if value is not None}
        config |= {"block_out_channels": config.get("decoder_block_out_channels", [64] * 4)}
    return _one_context({**DEFAULTS.get(class_name, {}), **config}, where)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A text encoder's own configuration, where the file has that of the whole CLIP that it is from."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _one_context(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A UNet's configuration with one width of the states that it attends to, where it gives one for each block."""
    widths = config.get("cross_attention_dim")
    if not isinstance(widths, list | tuple):
        return config
    if len(set(widths)) != 1:
        raise CheckpointError(
            f"{where}: cross_attention_dim {list(widths)}: its blocks attend to states of several widths; a text "
            "encoder gives one"
        )
    return {**config, "cross_attention_dim": widths[0]}


def _too_large(value: Any, key: str) -> str:
    """What is wrong with the numbers of a configuration, its nested ones too."""
    if isinstance(value, Mapping):
        return next((wrong for name, inner in value.items() if (wrong := _too_large(inner, str(name)))), "")
    if isinstance(value, list | tuple):
        return next((wrong for inner in value if (wrong := _too_large(inner, key))), "")
    # A bound by the key's name also holds for keys that no model here knows, and the libraries would build from.
    limit = MAX_LAYERS if re.search("layers|depths", key) else MAX_NUMBER
    if isinstance(value, int) and value > limit:
        return f"{key} {value}: expected at most {limit}"
    return ""
