"""From the names of a CompVis (LDM) checkpoint to diffusers' and transformers' names, without copying a weight.

The UNet, the autoencoder and the text encoders go through diffusers' own mapping. MiDaS' depth estimator, which
diffusers maps nowhere, has its table here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from diffusion_convert.checkpoint.ldm_mmdit import mmdit
from diffusion_convert.checkpoint.ldm_shapes import GUIDANCE, Tensors


def unet(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """An LDM UNet's tensors by UNet2DConditionModel's names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefixed = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    mapped: dict[str, torch.Tensor] = convert_ldm_unet_checkpoint(prefixed, dict(config))
    if GUIDANCE in tensors:  # diffusers' mapping does not know it
        mapped["time_embedding.cond_proj.weight"] = tensors[GUIDANCE]
    return mapped


def vae(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """An LDM autoencoder's tensors by AutoencoderKL's names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    mapped: dict[str, torch.Tensor] = convert_ldm_vae_checkpoint(dict(tensors), dict(config))
    return mapped


def clip(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A text model of transformers has its names already; the buffer of positions is no weight. As many layers as
    are used."""
    return {
        name: value
        for name, value in tensors.items()
        if not name.endswith("position_ids")
        and not (
            (layer := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))
            and int(layer[1]) >= config["num_hidden_layers"]
        )
    }


def clip_l(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """As `clip`, with the projection that diffusers puts in, whatever the file has: Stable Diffusion 3 takes the
    pooled state of this encoder as it is."""
    mapped = clip(tensors, config)
    like = next(iter(mapped.values()))
    return {**mapped, "text_projection.weight": torch.eye(int(config["hidden_size"]), dtype=like.dtype)}


def t5(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """transformers' names are in the file."""
    return dict(tensors)


def open_clip(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """An OpenCLIP text transformer's tensors by CLIPTextModel's names, as many blocks as are used."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    layers = int(config["num_hidden_layers"])
    used = {
        name: value
        for name, value in tensors.items()
        if not name.startswith("text_projection")
        and not ((block := re.match(r"transformer\.resblocks\.(\d+)\.", name)) and int(block[1]) >= layers)
    }
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    with _views():
        mapped: dict[str, torch.Tensor] = convert_open_clip_checkpoint(model, used, prefix="")
    return mapped


def open_clip_2(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """As `open_clip`, with the projection, by CLIPTextModelWithProjection's names."""
    projection = tensors.get("text_projection.weight")
    if projection is None:
        projection = tensors["text_projection"].T
    return {**open_clip(tensors, config), "text_projection.weight": projection}


def depth(tensors: Tensors, _config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """MiDaS' DPT hybrid by DPTForDepthEstimation's names. Its classification head is not used."""
    mapped: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if (place := re.fullmatch(r"pretrained\.model\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)) is not None:
            layer = f"dpt.encoder.layer.{place[1]}.attention.attention"
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                mapped[f"{layer}.{part}.{place[2]}"] = rows
        elif not name.startswith("pretrained.model.head."):
            mapped[_depth_name(name)] = value
    return mapped


_BIT = "dpt.embeddings.backbone.bit"
_DEPTH_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"pretrained\.model\.patch_embed\.backbone\.stem\.conv\.", f"{_BIT}.embedder.convolution."),
    (r"pretrained\.model\.patch_embed\.backbone\.stem\.norm\.", f"{_BIT}.embedder.norm."),
    (
        r"pretrained\.model\.patch_embed\.backbone\.stages\.(\d+)\.blocks\.",
        rf"{_BIT}.encoder.stages.\1.layers.",
    ),
    (r"pretrained\.model\.patch_embed\.proj\.", "dpt.embeddings.projection."),
    (r"pretrained\.model\.cls_token", "dpt.embeddings.cls_token"),
    (r"pretrained\.model\.pos_embed", "dpt.embeddings.position_embeddings"),
    (r"pretrained\.model\.norm\.", "dpt.layernorm."),
    (r"pretrained\.model\.blocks\.(\d+)\.norm1\.", r"dpt.encoder.layer.\1.layernorm_before."),
    (r"pretrained\.model\.blocks\.(\d+)\.norm2\.", r"dpt.encoder.layer.\1.layernorm_after."),
    (r"pretrained\.model\.blocks\.(\d+)\.attn\.proj\.", r"dpt.encoder.layer.\1.attention.output.dense."),
    (r"pretrained\.model\.blocks\.(\d+)\.mlp\.fc1\.", r"dpt.encoder.layer.\1.intermediate.dense."),
    (r"pretrained\.model\.blocks\.(\d+)\.mlp\.fc2\.", r"dpt.encoder.layer.\1.output.dense."),
    (
        r"pretrained\.act_postprocess(\d)\.0\.project\.0\.",
        lambda m: f"neck.reassemble_stage.readout_projects.{int(m[1]) - 1}.0.",
    ),
    (
        r"pretrained\.act_postprocess(\d)\.3\.",
        lambda m: f"neck.reassemble_stage.layers.{int(m[1]) - 1}.projection.",
    ),
    (r"pretrained\.act_postprocess(\d)\.4\.", lambda m: f"neck.reassemble_stage.layers.{int(m[1]) - 1}.resize."),
    (r"scratch\.layer(\d)_rn\.", lambda m: f"neck.convs.{int(m[1]) - 1}."),
    (
        r"scratch\.refinenet(\d)\.resConfUnit(\d)\.conv(\d)\.",
        lambda m: f"neck.fusion_stage.layers.{4 - int(m[1])}.residual_layer{m[2]}.convolution{m[3]}.",
    ),
    (r"scratch\.refinenet(\d)\.out_conv\.", lambda m: f"neck.fusion_stage.layers.{4 - int(m[1])}.projection."),
    (r"scratch\.output_conv\.", "head.head."),
)


def _depth_name(name: str) -> str:
    for pattern, replacement in _DEPTH_NAMES:
        if (found := re.match(pattern, name)) is not None:
            start = replacement(found) if callable(replacement) else found.expand(replacement)
            return start + name[found.end() :]
    return name


def _views() -> Any:
    """While it is entered, ``clone`` and ``contiguous`` return the view that they are called on. Diffusers copies
    the parts of OpenCLIP's joint projection; mapped weights should be read when they are used and not before."""
    from torch.overrides import TorchFunctionMode

    class Views(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if func in (torch.Tensor.clone, torch.Tensor.contiguous):
                return args[0]
            return func(*args, **(kwargs or {}))

    return Views()


NAMES: Mapping[str, Callable[[Tensors, Mapping[str, Any]], Tensors]] = {
    "unet": unet,
    "vae": vae,
    "clip": clip,
    "open_clip": open_clip,
    "clip_2": clip,
    "open_clip_2": open_clip_2,
    "depth": depth,
    "mmdit": mmdit,
    "clip_l": clip_l,
    "t5": t5,
}
