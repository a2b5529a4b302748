"""A file with a UNet alone under diffusers' names, as distilled UNets are published, by LDM's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError
from diffusion_runtime.real_path import is_there

if TYPE_CHECKING:
    import torch

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
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    layers = len({found[1] for name in inner if (found := re.match(r"down_blocks\.0\.resnets\.(\d{1,3})\.", name))})
    attending = {found[1] for name in inner if (found := re.match(r"up_blocks\.(\d{1,3})\.attentions\.", name))}
    return {_ldm_name(name, layers + 1, attending): value for name, value in inner.items()}


def name_of(path: Path) -> str:
    """What a file or folder with a UNet is called: ``unet`` and ``diffusion_pytorch_model`` say nothing of it."""
    if path.name.partition(".")[0] == "diffusion_pytorch_model":
        return name_of(path.parent)
    if path.name == "unet" and path.parent.name:
        return path.parent.name
    return path.name if path.is_dir() else path.stem


def config_beside(path: Path) -> dict[str, Any]:
    """What config.json beside a UNet's file says, empty where there is none of a UNet. Raises CheckpointError."""
    config = path.parent / "config.json"
    found = strict_json.read_object(config, CheckpointError) if is_there(config, CheckpointError) else {}
    return found if found.get("_class_name") == CLASS_NAME else {}


def _prefix(tensors: Mapping[str, torch.Tensor]) -> str | None:
    return next((prefix for prefix in PREFIXES if f"{prefix}{_MARK}" in tensors), None)


def _ldm_name(name: str, step: int, attending: set[str]) -> str:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    if mid := _MID.fullmatch(name):
        place = 2 * int(mid[2]) if mid[1] == "resnets" else 1
        return f"middle_block.{place}.{_within(mid[1], mid[3])}"
    block = _BLOCK.fullmatch(name)
    if block is None:
        return name
    way, number, part, layer, rest = block.groups()
    return _PLACES[part](way, int(number), int(layer), step, number in attending) + _within(part, rest)


def _layer(part: int) -> Callable[[str, int, int, int, bool], str]:
    def place(way: str, block: int, layer: int, step: int, _attends: bool) -> str:
        first, side = (1, "input") if way == "down" else (0, "output")
        return f"{side}_blocks.{block * step + layer + first}.{part}."

    return place


def _down(_way: str, block: int, _layer: int, step: int, _attends: bool) -> str:
    return f"input_blocks.{(block + 1) * step}.0.op."


def _up(_way: str, block: int, _layer: int, step: int, attends: bool) -> str:
    return f"output_blocks.{(block + 1) * step - 1}.{1 + attends}.conv."


_PLACES: Mapping[str, Callable[[str, int, int, int, bool], str]] = {
    "resnets": _layer(0),
    "attentions": _layer(1),
    "downsamplers": _down,
    "upsamplers": _up,
}


def _within(part: str, rest: str) -> str:
    """The name inside of a layer: a ResNet's differ, a transformer's do not, a sampler's is its convolution's."""
    head, dot, kind = rest.partition(".")
    if part == "resnets":
        return f"{_RESNET.get(head, head)}{dot}{kind}"
    return rest if part == "attentions" else kind
