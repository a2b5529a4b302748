"""A file with a UNet alone under diffusers' names, as distilled UNets are published, by LDM's names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint.tensor_file import below
from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError
from diffusion_runtime.real_path import is_there

PREFIXES = ("", "unet.", "model.diffusion_model.", "diffusion_model.")
CLASS_NAME = "UNet2DConditionModel"
_MARK = "down_blocks.0.resnets.0.conv1.weight"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)")


def is_one(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file holds a whole UNet by diffusers' names."""
    return _prefix(tensors) is not None


def by_ldm_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The UNet's tensors by LDM's names, in which blocks are counted through. What has no such name keeps its own.

    No tensor is copied."""
    prefix = _prefix(tensors) or ""
    inner = below(tensors, prefix)
    modules = ldm_modules(inner)
    parted = {name: name.rpartition(".") for name in inner}
    return {f"{modules.get(m, m)}{dot}{kind}": inner[name] for name, (m, dot, kind) in parted.items()}


def ldm_modules(tensors: Iterable[str]) -> dict[str, str]:
    """Of a UNet's tensors' names: LDM's names of the modules, and Stability AI's for SDXL, by diffusers' names.
    Blocks are counted, not assumed: distilled UNets have fewer layers."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    found = [(module, block) for module in modules if (block := _BLOCK.fullmatch(module)) is not None]
    sizes: dict[tuple[str, int], set[tuple[str, int]]] = {}
    attended = set()
    for _, block in found:
        side, number, inner, index = block[1], int(block[2]), block[3], int(block[4])
        if inner in ("resnets", "downsamplers"):  # each is an input block of its own
            sizes.setdefault((side, number), set()).add((inner, index))
        if inner == "attentions":
            attended.add((side, number))
    names = {module: _ENDS[module] for module in modules if module in _ENDS}
    for module in modules:
        if mid := _MID.fullmatch(module):
            place = 2 * int(mid[2]) if mid[1] == "resnets" else 1
            names[module] = f"middle_block.{place}.{_within(mid[1], mid[3])}"
    for module, block in found:
        side, number, inner, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        before = sum(len(size) for (other, n), size in sizes.items() if other == side and n < number)
        own = len(sizes.get((side, number), ()))
        if inner == "downsamplers":
            names[module] = f"input_blocks.{before + own}.0.{rest.replace('conv', 'op')}"
        elif inner == "upsamplers":
            names[module] = f"output_blocks.{before + own - 1}.{1 + ((side, number) in attended)}.{rest}"
        else:
            start = f"input_blocks.{1 + before + index}" if side == "down" else f"output_blocks.{before + index}"
            names[module] = f"{start}.{int(inner == 'attentions')}.{_within(inner, rest)}"
    return names


def name_of(path: Path) -> str:
    """What a file or folder with a UNet is called: ``unet`` and ``diffusion_pytorch_model`` say nothing of it."""
    if path.name.partition(".")[0] == "diffusion_pytorch_model":
        return name_of(path.parent)
    if path.name == "unet" and path.parent.name:
        return path.parent.name
    return path.name if path.is_dir() else path.stem


def config_beside(path: Path, class_names: Collection[str] = (CLASS_NAME,)) -> dict[str, Any]:
    """What config.json beside a network's file says, empty where there is none of these classes. Raises
    CheckpointError."""
    config = path.parent / "config.json"
    found = strict_json.read_object(config, CheckpointError) if is_there(config, CheckpointError) else {}
    return found if found.get("_class_name") in class_names else {}


def _prefix(tensors: Mapping[str, torch.Tensor]) -> str | None:
    return next((prefix for prefix in PREFIXES if f"{prefix}{_MARK}" in tensors), None)


def _within(part: str, rest: str) -> str:
    """The name inside of a layer: a ResNet's modules have others, a transformer's have not."""
    return _RESNET.get(rest, rest) if part == "resnets" else rest
