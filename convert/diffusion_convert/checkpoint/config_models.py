"""What a network's configuration may say, checked where it is read: types, and sizes that can be built.

A network is built without storage, but a million layers are a million objects. What the libraries' own classes
check is left to them; so is what to do with unknown keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError

MAX_LAYERS = 256
MAX_NUMBER = 2**24
"""Larger than any width, vocabulary or size of a picture."""

Count = Annotated[int, Field(strict=True, ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Field(strict=True, ge=1, le=2**16)]
Channels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Words = Annotated[int, Field(strict=True, ge=4, le=MAX_NUMBER)]
Positions = Annotated[int, Field(strict=True, ge=8, le=4096)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=2**15)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
Names = Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)]
Token = Annotated[int, Field(strict=True, ge=-1, le=MAX_NUMBER)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class _Attending(_Open):
    """What diffusers' UNets and ControlNets have in common."""

    in_channels: Channels = 4
    block_out_channels: Widths = (320, 640, 1280, 1280)
    down_block_types: Names | None = None
    layers_per_block: Count | tuple[Count, ...] = 2
    cross_attention_dim: Width | Widths = 1280
    attention_head_dim: Width | Widths | None = 8
    num_attention_heads: Width | Widths | None = None
    norm_num_groups: Width | None = 32
    norm_eps: Positive = 1e-5
    downsample_padding: Annotated[int, Field(strict=True, ge=0, le=16)] = 1
    act_fn: Text = "silu"
    num_class_embeds: Words | None = None
    class_embed_type: Text | None = None
    encoder_hid_dim: Width | None = None
    use_linear_projection: Flag | None = False


class UNet(_Attending):
    """diffusers' UNet2DConditionModel."""

    out_channels: Channels = 4
    up_block_types: Names | None = None
    sample_size: Pixels | tuple[Pixels, Pixels] | None = None


class ControlNet(_Attending):
    """diffusers' ControlNetModel."""

    conditioning_channels: Channels = 3
    conditioning_embedding_out_channels: Widths = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: Flag = False


class ControlNetUnion(ControlNet):
    """diffusers' ControlNetUnionModel."""

    num_control_type: Count = 6
    num_trans_channel: Width = 320
    num_trans_head: Width = 8
    num_trans_layer: Count = 1
    num_proj_channel: Width = 320


class Transformer(_Open):
    """diffusers' SD3Transformer2DModel."""

    in_channels: Channels = 16
    out_channels: Channels | None = 16
    sample_size: Pixels = 128
    patch_size: Annotated[int, Field(strict=True, ge=1, le=64)] = 2
    num_layers: Count = 18
    attention_head_dim: Width = 64
    num_attention_heads: Width = 18
    joint_attention_dim: Width = 4096
    caption_projection_dim: Width = 1152
    pooled_projection_dim: Width = 2048
    pos_embed_max_size: Annotated[int, Field(strict=True, ge=1, le=4096)] = 96
    dual_attention_layers: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0, le=MAX_LAYERS)], ...], Field(max_length=MAX_LAYERS)
    ] = ()
    qk_norm: Text | None = None


class Vae(_Open):
    """diffusers' AutoencoderKL."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    latent_channels: Channels = 4
    block_out_channels: Widths = (64,)
    down_block_types: Names | None = None
    up_block_types: Names | None = None
    layers_per_block: Count = 1
    norm_num_groups: Width = 32
    act_fn: Text = "silu"
    scaling_factor: Positive | None = None
    shift_factor: Number | None = None
    latents_mean: tuple[Number, ...] | None = None
    latents_std: tuple[Positive, ...] | None = None
    sample_size: Pixels | tuple[Pixels, Pixels] | None = None


class TinyVae(_Open):
    """diffusers' AutoencoderTiny. ``block_out_channels``: the decoder's, by which the size of latents is told; with
    ``scaling_factor`` and the rest, the class's own defaults."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    latent_channels: Channels = 4
    encoder_block_out_channels: Widths = (64, 64, 64, 64)
    decoder_block_out_channels: Widths = (64, 64, 64, 64)
    num_encoder_blocks: tuple[Count, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[Count, ...] = (3, 3, 3, 1)
    upsampling_scaling_factor: Literal[2] = 2
    act_fn: Text = "relu"
    scaling_factor: Positive = 1.0
    shift_factor: Number = 0.0


class ClipText(_Open):
    """transformers' CLIPTextModel."""

    hidden_size: Width = 512
    intermediate_size: Width = 2048
    num_hidden_layers: Count = 12
    num_attention_heads: Width = 8
    max_position_embeddings: Positions = 77
    vocab_size: Words = 49408
    hidden_act: Text = "quick_gelu"
    layer_norm_eps: Positive = 1e-5
    bos_token_id: Token | None = None
    eos_token_id: Token | None = None
    pad_token_id: Token | None = None
    projection_dim: Width | None = None


class T5(_Open):
    """transformers' T5EncoderModel."""

    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Count = 6
    num_heads: Width = 8
    vocab_size: Words = 32128
    relative_attention_num_buckets: Annotated[int, Field(strict=True, ge=4, le=4096)] = 32
    relative_attention_max_distance: Annotated[int, Field(strict=True, ge=4, le=2**16)] = 128
    layer_norm_epsilon: Positive = 1e-6
    feed_forward_proj: Text = "relu"


class Vision(_Open):
    """The picture's half of a CLIP."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Width = 12
    num_channels: Channels = 3
    image_size: Pixels = 224
    patch_size: Pixels = 32
    hidden_act: Text = "quick_gelu"
    layer_norm_eps: Positive = 1e-5


class SafetyChecker(_Open):
    """diffusers' StableDiffusionSafetyChecker."""

    vision_config: Vision | None = None
    text_config: dict[str, Any] | None = None
    projection_dim: Width = 512


class Depth(Vision):
    """transformers' DPTForDepthEstimation."""

    image_size: Pixels = 384
    patch_size: Pixels = 16
    neck_hidden_sizes: Widths = (96, 192, 384, 768)
    fusion_hidden_size: Width = 256
    backbone_config: dict[str, Any] | None = None


MODELS: Mapping[str, type[_Open]] = {
    "UNet2DConditionModel": UNet,
    "ControlNetModel": ControlNet,
    "ControlNetUnionModel": ControlNetUnion,
    "SD3Transformer2DModel": Transformer,
    "AutoencoderKL": Vae,
    "AutoencoderTiny": TinyVae,
    "CLIPTextModel": ClipText,
    "CLIPTextModelWithProjection": ClipText,
    "T5EncoderModel": T5,
    "StableDiffusionSafetyChecker": SafetyChecker,
    "DPTForDepthEstimation": Depth,
}
"""By the class named in model_index.json; one that is not here is refused when it is built."""
FILLED = (
    *("in_channels", "out_channels", "latent_channels", "cross_attention_dim", "hidden_size", "vocab_size"),
    *("joint_attention_dim", "pooled_projection_dim", "d_model"),
)
"""Keys that are read here, so that the libraries' defaults are put in where a configuration leaves them out."""


def checked(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``config`` with the keys of `FILLED`, where the class has them. Raises CheckpointError, with the first field
    that is wrong."""
    if wrong := _too_large(config, ""):
        raise CheckpointError(f"{where}: {wrong}")
    if class_name not in MODELS:
        return dict(config)
    if MODELS[class_name] is ClipText:
        config = _text_part(config)
    model = strict_json.as_model(MODELS[class_name], dict(config), where, f"a {class_name}", CheckpointError)
    filled = {name: getattr(model, name) for name in FILLED if name in type(model).model_fields}
    settled = {**filled, **config}
    if isinstance(model, TinyVae):
        told = {"scaling_factor": model.scaling_factor, "shift_factor": model.shift_factor}
        return {**settled, **told, "block_out_channels": list(model.decoder_block_out_channels)}
    return _one_context(settled, where) if isinstance(model, _Attending) else settled


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A text encoder's own configuration, where the file has that of the whole CLIP that it is from."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _one_context(unet: dict[str, Any], where: str) -> dict[str, Any]:
    """A UNet's configuration with one width of the states that it attends to, where it gives one for each block."""
    widths = unet["cross_attention_dim"]
    if isinstance(widths, int):
        return unet
    if len(set(widths)) != 1:
        raise CheckpointError(
            f"{where}: cross_attention_dim {list(widths)}: its blocks attend to states of several widths; a text "
            "encoder gives one"
        )
    return {**unet, "cross_attention_dim": widths[0]}


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
