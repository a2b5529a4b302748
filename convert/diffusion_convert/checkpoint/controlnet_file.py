"""A ControlNet in one file: in LDM's layout as the first ones were published, or under diffusers' names.

A file says nothing of its network but shapes. What no shape shows (heads, activations) is as in the UNet that it is
given for: a ControlNet is trained from a copy of that UNet's first half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import config_models, diffusers_unet, ldm_configs, tensor_file
from diffusion_convert.checkpoint.ldm_shapes import Tensors
from diffusion_convert.checkpoint.model import Submodel
from diffusion_runtime.errors import CheckpointError

CLASS_NAME, UNION = "ControlNetModel", "ControlNetUnionModel"
TASKS = "task_embedding"
"""The weight that a union alone has: a row for each kind of picture."""
_LDM_PREFIXES = ("control_model.", "")
_LDM_MARK, _DIFFUSERS_MARK = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"
_POOLS = "shuffle"
"""Files of this name give means over the picture; what says so is a configuration next to them."""
_OF_UNET = (
    *("act_fn", "addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim"),
    *("class_embed_type", "downsample_padding", "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor"),
    *("norm_eps", "norm_num_groups", "num_attention_heads", "only_cross_attention"),
    *("resnet_time_scale_shift", "transformer_layers_per_block", "upcast_attention"),
)
"""What a ControlNet's configuration has of its UNet's, as diffusers' ``ControlNetModel.from_unet`` takes it."""
_OTHERS: Mapping[str, str] = {
    r"lora_controlnet$": "a Control-LoRA, which holds differences from a UNet and no network of its own: give the "
    "whole ControlNet",
    r"lllite_": "a ControlNet-LLLite, which changes the UNet's attention from inside and gives no residuals",
    r"difference$": "the difference from a UNet, and no network of its own: give the whole ControlNet",
    r"(adapter\.)?body\.\d": "a T2I-Adapter, and no ControlNet",
    r"(ip_adapter|image_proj)\.": "an IP-Adapter, and no ControlNet",
    r".*(ctrl_to_base|base_to_ctrl)": "a ControlNet-XS, whose parts are woven into the UNet's",
    r"(controlnet_blocks|transformer_blocks|double_blocks)\.": "for a transformer (Stable Diffusion 3, Flux)",
    r"lora_unet_|lora_te": "a LoRA: give it with --lora",
}
"""What files of other kinds are, by how one of their names begins."""


def read(path: Path, unet: Mapping[str, Any]) -> Submodel:
    """The ControlNet in a file, for a checkpoint with that configuration of its UNet. No weight is read.

    Raises CheckpointError for a file that is damaged or of another kind."""
    tensors = tensor_file.read(path).tensors
    if (prefix := _ldm_prefix(tensors)) is None and _DIFFUSERS_MARK not in tensors:
        raise CheckpointError(f"{path}: {_other_kind(tensors)}")
    mapped = dict(tensors) if prefix is None else _from_ldm(tensor_file.below(tensors, prefix), path)
    class_name = UNION if TASKS in mapped else CLASS_NAME
    told = _config_beside(path) if prefix is None else {}
    try:
        config = told or {**{key: unet[key] for key in _OF_UNET if key in unet}, **_sizes(mapped, unet)}
        config = config_models.checked(class_name, {**config, **_pooling(path, told)}, str(path))
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{path}: no whole ControlNet: it lacks {error}") from error
    return Submodel(class_name, config, partial(_read, path, prefix), (path,))


KIND = "controlnet"


def _config_beside(path: Path) -> dict[str, Any]:
    return diffusers_unet.config_beside(path, (CLASS_NAME, UNION))


def is_guess(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether it is by the file's name alone that a ControlNet is known to give means."""
    told = "global_pool_conditions" in _config_beside(path) or _told_pooling(path) is not None
    return bool(config.get("global_pool_conditions")) and not told


def _read(path: Path, prefix: str | None) -> Mapping[str, torch.Tensor]:
    tensors = tensor_file.read(path).tensors
    return tensors if prefix is None else _from_ldm(tensor_file.below(tensors, prefix), path)


def _ldm_prefix(tensors: Tensors) -> str | None:
    return next((prefix for prefix in _LDM_PREFIXES if f"{prefix}{_LDM_MARK}" in tensors), None)


def _other_kind(tensors: Tensors) -> str:
    for pattern, what in _OTHERS.items():
        if any(re.match(pattern, name) for name in tensors):
            return f"this is {what}"
    return "no ControlNet: expected control_model.input_hint_block.0.weight or diffusers' controlnet_cond_embedding"


def _from_ldm(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """An LDM ControlNet's tensors by ControlNetModel's names, as diffusers maps them; SDXL's sizes, too."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    blocks = sorted(
        int(found[1]) for name in tensors if (found := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    layers = (
        blocks[0] - 1 if blocks else len({name.split(".")[1] for name in tensors if "input_blocks." in name}) - 1
    )
    mapped = convert_controlnet_checkpoint(dict(tensors), {"layers_per_block": max(layers, 1)})
    for kind in ("weight", "bias"):
        for number, layer in ((1, 0), (2, 2)):
            if f"label_emb.0.{layer}.{kind}" in tensors:
                mapped[f"add_embedding.linear_{number}.{kind}"] = tensors[f"label_emb.0.{layer}.{kind}"]
    if lost := [name for name, value in mapped.items() if value is None]:  # diffusers' way to say so
        raise CheckpointError(f"{path}: no whole ControlNet: it lacks {lost[0]}")
    return dict(mapped)


def _sizes(tensors: Tensors, unet: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes tell. Raises KeyError for what is missing."""
    blocks = range(len({name.split(".")[1] for name in tensors if name.startswith("down_blocks.")}))
    layers = {len(_numbers(tensors, rf"down_blocks\.{block}\.resnets")) for block in blocks}
    hint = tensors["controlnet_cond_embedding.conv_in.weight"].shape
    steps = _numbers(tensors, r"controlnet_cond_embedding\.blocks")[1::2]
    cross = next((value.shape[1] for name, value in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    added = tensors.get("add_embedding.linear_1.weight")
    project = next((value for name, value in tensors.items() if name.endswith(".proj_in.weight")), None)
    return {
        "_class_name": UNION if TASKS in tensors else CLASS_NAME,
        "addition_embed_type": None if added is None else "text_time",
        "block_out_channels": [int(tensors[f"down_blocks.{n}.resnets.0.conv2.weight"].shape[0]) for n in blocks],
        "conditioning_channels": int(hint[1]),
        "conditioning_embedding_out_channels": [
            int(hint[0]),
            *(int(tensors[f"controlnet_cond_embedding.blocks.{n}.weight"].shape[0]) for n in steps),
        ],
        "cross_attention_dim": cross if cross is not None else unet["cross_attention_dim"],
        "down_block_types": [
            "CrossAttnDownBlock2D" if _numbers(tensors, rf"down_blocks\.{n}\.attentions") else "DownBlock2D"
            for n in blocks
        ],
        "in_channels": int(tensors["conv_in.weight"].shape[1]),
        "layers_per_block": max(layers, default=0),
        **_middle(tensors, unet, len(blocks)),
        "projection_class_embeddings_input_dim": None if added is None else int(added.shape[1]),
        "use_linear_projection": project is not None and project.ndim == 2,
        **(_union_sizes(tensors) if TASKS in tensors else {}),
    }


def _union_sizes(tensors: Tensors) -> dict[str, int]:
    kinds, width = tensors[TASKS].shape
    return {
        "num_control_type": int(kinds),
        "num_trans_channel": int(width),
        "num_trans_layer": len(_numbers(tensors, "transformer_layes")),
        "num_proj_channel": int(tensors["spatial_ch_projs.weight"].shape[0]),
    }


def _middle(tensors: Tensors, unet: Mapping[str, Any], count: int) -> dict[str, Any]:
    """How deep transformers are: of blocks that have none, as the UNet says, which matters to nothing."""
    told = unet.get("transformer_layers_per_block", 1)
    usual = list(told) if isinstance(told, list | tuple) else [told] * count
    attends = bool(_numbers(tensors, r"mid_block\.attentions"))
    depths = [
        len(_numbers(tensors, rf"down_blocks\.{n}\.attentions\.0\.transformer_blocks"))
        or (usual[n] if n < len(usual) else 1)
        for n in range(count)
    ]
    if attends:
        depths[-1] = len(_numbers(tensors, r"mid_block\.attentions\.0\.transformer_blocks"))
    return {
        "transformer_layers_per_block": depths,
        **(
            {}
            if TASKS in tensors
            else {"mid_block_type": "UNetMidBlock2DCrossAttn" if attends else "UNetMidBlock2D"}
        ),
    }


def _numbers(tensors: Tensors, prefix: str) -> list[int]:
    """The numbers that follow ``prefix`` in names, in order."""
    return sorted({int(found[1]) for name in tensors if (found := re.match(rf"{prefix}\.(\d+)\.", name))})


def _pooling(path: Path, told: Mapping[str, Any]) -> dict[str, bool]:
    if "global_pool_conditions" in told:
        return {}
    said = _told_pooling(path)
    return {"global_pool_conditions": (_POOLS in path.stem.lower()) if said is None else said}


def _told_pooling(path: Path) -> bool | None:
    """What an LDM configuration next to the file says; None where there is none."""
    told = ldm_configs.read_parameters(path.with_suffix(".yaml"))
    return None if told is None else bool(told.get("global_average_pooling"))
