"""Weights in 8-bit floating point with a scale for each, as node editors store them: MODULE.weight in float8 beside
MODULE.scale_weight (or weight_scale), a number. Weights without a scale are read as they are."""

from __future__ import annotations

from functools import partial

import torch

from diffusion_convert.checkpoint.computed import Computed
from diffusion_convert.checkpoint.ldm_shapes import Tensors
from diffusion_convert.checkpoint.torch_networks import listed
from diffusion_runtime.errors import CheckpointError

_SCALES = ("scale_weight", "weight_scale")
_OF_INPUTS = ("scale_input", "input_scale", "comfy_quant")
"""For arithmetic in 8 bits, and what names the format: of no use where weights are computed with in 16 bits."""
_MARK = "scaled_fp8"


def apart(part: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A network's weights, and the scales of those that have one, by the weights' names."""
    small = (torch.float8_e4m3fn, torch.float8_e5m2)
    weights, scales = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, value in part.items():
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        in_float8 = weight in part and part[weight].dtype in small
        if kind in _SCALES and in_float8 and value.numel() == 1:
            scales[weight] = value
        elif not (name == _MARK or (kind in _OF_INPUTS and in_float8)):
            weights[name] = value
    return weights, scales


def scaled(mapped: Tensors, weights: Tensors, scales: Tensors) -> Tensors:
    """``mapped``, the weights under other names, each times its scale when it is read. Raises CheckpointError where
    a weight with a scale was taken apart: its parts cannot be told from others."""
    if not scales:
        return mapped
    by_weight = {id(weights[name]): (name, scale) for name, scale in scales.items()}
    found = {name: by_weight[id(value)] for name, value in mapped.items() if id(value) in by_weight}
    if lost := set(scales) - {weight for weight, _ in found.values()}:
        raise CheckpointError(f"weights with a scale that have no place in the network: {listed(sorted(lost))}")
    return Computed(mapped, {name: partial(_times, scale) for name, (_, scale) in found.items()})


def _times(scale: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In float32, rounded to float16 once."""
    return (value.float() * scale.float()).half()
