"""Upsampling of the last two dimensions. ``resize_…`` ops are no conversion's from torch."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import check_count, mil_op


@mil_op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    return _interpolate(x, scale_factor_height, scale_factor_width, "nearest", None)


@mil_op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """``half_pixel_centers`` by default is not ``align_corners``, and torch knows no other."""
    if half_pixel_centers not in (None, not align_corners):
        raise UnsupportedError(
            f"upsample_bilinear: align_corners {align_corners} together with half_pixel_centers "
            f"{half_pixel_centers} is not covered"
        )
    return _interpolate(x, scale_factor_height, scale_factor_width, "bilinear", align_corners)


def _interpolate(
    x: Tensor, height_factor: float, width_factor: float, mode: str, align_corners: bool | None
) -> Tensor:
    """torch's own, over the last two dimensions of a tensor of any rank. The scale is that of the whole sizes."""
    height, width = math.floor(x.shape[-2] * height_factor), math.floor(x.shape[-1] * width_factor)
    check_count("resize", math.prod(x.shape[:-2]) * height * width)
    images = x.reshape(1, -1, *x.shape[-2:]) if x.ndim != 4 else x
    resized = F.interpolate(images, (height, width), mode=mode, align_corners=align_corners)
    return resized.reshape(*x.shape[:-2], height, width)
