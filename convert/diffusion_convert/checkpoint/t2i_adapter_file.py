"""A T2I-Adapter in one file: by TencentARC's names, as the first ones were published, or by diffusers'.

A file says nothing of its network but shapes, and these tell all that published adapters differ in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import tensor_file
from diffusion_convert.checkpoint.ldm_shapes import Tensors
from diffusion_convert.checkpoint.model import Submodel
from diffusion_runtime.errors import CheckpointError

CLASS_NAME = "T2IAdapter"
_OWN = "adapter."
"""How diffusers' names begin."""
_USUAL_LAYERS = 2
_XL_CHANNELS = (16 * 16, 3 * 16 * 16)
"""What SDXL's see of a grey or coloured picture, 16 times smaller; Stable Diffusion 1's see 64 or 192."""


def read(path: Path) -> Submodel:
    """The adapter in a file. No weight is read. Raises CheckpointError for a file that is damaged or holds none."""
    tensors = _read(path)
    try:
        config = _light(tensors) if f"{_OWN}conv_in.weight" not in tensors else _full(tensors)
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{path}: no T2I-Adapter: it lacks {error}") from error
    return Submodel(CLASS_NAME, {"_class_name": CLASS_NAME, **config}, partial(_read, path), (path,))


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    tensors = tensor_file.read(path).tensors
    if any(name.startswith(_OWN) for name in tensors):
        return tensors
    starts = [int(found[1]) for name in tensors if (found := re.fullmatch(r"body\.(\d+)\.in_conv\.weight", name))]
    layers = math.gcd(*starts) or _USUAL_LAYERS  # a block begins where the number of channels changes
    return {_OWN + _renamed(name, layers): value for name, value in tensors.items()}


def _renamed(name: str, layers: int) -> str:
    """TencentARC counts the layers of all blocks of a full adapter through, those of a light one in each block."""
    if inner := re.fullmatch(r"body\.(\d+)\.body\.(\d+)\.(.+)", name):
        return f"body.{inner[1]}.resnets.{inner[2]}.{inner[3]}"
    if whole := re.fullmatch(r"body\.(\d+)\.(block.+|in_conv.+)", name):
        block, layer = divmod(int(whole[1]), layers)
        if whole[2].startswith("block"):
            return f"body.{block}.resnets.{layer}.{whole[2]}"
        return f"body.{block if layers > 1 else whole[1]}.{whole[2]}"
    return name


def _full(tensors: Tensors) -> dict[str, Any]:
    seen = int(tensors[f"{_OWN}conv_in.weight"].shape[1])
    factor = 16 if seen in _XL_CHANNELS else 8
    return {
        "adapter_type": "full_adapter_xl" if factor == 16 else "full_adapter",
        "downscale_factor": factor,
        **_sizes(tensors, "resnets.0.block1", seen // factor**2),
    }


def _light(tensors: Tensors) -> dict[str, Any]:
    seen = int(tensors[f"{_OWN}body.0.in_conv.weight"].shape[1])
    told = _sizes(tensors, "out_conv", seen // 64)
    told["channels"] = told["channels"][:-1]  # diffusers adds a block, of as many as the one before
    return {"adapter_type": "light_adapter", "downscale_factor": 8, **told}


def _sizes(tensors: Tensors, last: str, in_channels: int) -> dict[str, Any]:
    """``last``: a layer that gives as many channels as its block."""
    numbers = [re.match(rf"{_OWN}body\.(\d+)\.resnets\.(\d+)\.", name) for name in tensors]
    blocks, layers = ({int(found[place]) for found in numbers if found} for place in (1, 2))
    channels = [int(tensors[f"{_OWN}body.{block}.{last}.weight"].shape[0]) for block in sorted(blocks)]
    return {"channels": channels, "in_channels": in_channels, "num_res_blocks": len(layers)}
