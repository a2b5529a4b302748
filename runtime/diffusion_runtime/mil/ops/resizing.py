"""Resizing of the last two dimensions."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import check_count, mil_op

Sampling = Literal["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "UNALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS"]
_NATIVE = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}


@mil_op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return _interpolate(x, height, width, "nearest", None)


@mil_op("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _interpolate(x, target_size_height, target_size_width, "nearest", None)


@mil_op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The scale is that of the whole sizes; ``half_pixel_centers`` by default is not ``align_corners``."""
    centred = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and centred:
        raise UnsupportedError("upsample_bilinear: align_corners together with half_pixel_centers is not covered")
    mode: Sampling = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centred else "DEFAULT"
    return _bilinear(x, *_scaled(x, scale_factor_height, scale_factor_width), mode)


@mil_op("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: Sampling = "DEFAULT"
) -> Tensor:
    return _bilinear(x, target_size_height, target_size_width, sampling_mode)


def _scaled(x: Tensor, height: float, width: float) -> tuple[int, int]:
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


def _interpolate(x: Tensor, height: int, width: int, mode: str, align_corners: bool | None) -> Tensor:
    """torch's own, over the last two dimensions of a tensor of any rank."""
    check_count("resize", math.prod(x.shape[:-2]) * height * width)
    images = x.reshape(1, -1, *x.shape[-2:]) if x.ndim != 4 else x
    resized = F.interpolate(images, (height, width), mode=mode, align_corners=align_corners)
    return resized.reshape(*x.shape[:-2], height, width)


def _bilinear(x: Tensor, height: int, width: int, mode: Sampling) -> Tensor:
    if mode in _NATIVE:
        return _interpolate(x, height, width, "bilinear", _NATIVE[mode])
    check_count("resize", math.prod(x.shape[:-2]) * height * width)
    return _linear(_linear(x, x.ndim - 2, height, mode), x.ndim - 1, width, mode)


def _positions(size: int, count: int, mode: Sampling) -> Tensor:
    """Where ``count`` samples lie in 0 … ``size`` - 1 (MIL's resize_bilinear defines the five modes)."""
    steps = torch.arange(count, dtype=torch.float64)
    if mode == "UNALIGN_CORNERS":
        places = (steps + 0.5) * (size / count) - 0.5
    elif mode == "DEFAULT":
        places = steps * (size / count)
    elif mode == "OFFSET_CORNERS":
        places = (steps + 0.5) * (max(1, size - 1) / count)
    elif count == 1:
        places = steps + ((size - 1) / 2 if mode == "ALIGN_CORNERS" else 0)
    else:
        places = steps * ((size - 1) / (count - 1))
    return places.clamp(0, size - 1)


def _linear(x: Tensor, axis: int, count: int, mode: Sampling) -> Tensor:
    places = _positions(x.shape[axis], count, mode)
    low = places.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    weight = (places - low).to(x).reshape(-1, *[1] * (x.ndim - axis - 1))
    return torch.lerp(x.index_select(axis, low.to(x.device)), x.index_select(axis, high.to(x.device)), weight)
