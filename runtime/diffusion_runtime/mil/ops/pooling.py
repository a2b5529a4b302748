"""Pooling with one to three spatial dimensions: x is (batch, channels, *spatial)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.convolution import PadType, paddings
from diffusion_runtime.mil.ops.registry import mil_op

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
Pads = list[tuple[int, int]]


@mil_op("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Sequence[int],
    pad_type: PadType,
    strides: Sequence[int] | None = None,
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or [1] * len(kernel_sizes)
    pads, rest = _windows("max_pool", x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    padded = _pad(
        x, [(before, after + extra) for (before, after), extra in zip(pads, rest, strict=True)], -torch.inf
    )
    return _MAX[len(kernel_sizes)](padded, list(kernel_sizes), list(strides))


@mil_op("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Sequence[int],
    pad_type: PadType,
    strides: Sequence[int] | None = None,
    pad: Sequence[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """What ``ceil_mode`` adds beyond the padding never counts in the average; the padding does unless excluded."""
    strides = strides or [1] * len(kernel_sizes)
    pads, rest = _windows("avg_pool", x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    average = _AVERAGE[len(kernel_sizes)]
    whole = [(before, after + extra) for (before, after), extra in zip(pads, rest, strict=True)]
    pooled = average(_pad(x, whole, 0.0), list(kernel_sizes), list(strides))
    if not any(extra for pair in whole for extra in pair):
        return pooled
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    counted = _pad(
        _pad(ones, pads, 0.0 if exclude_padding_from_average else 1.0), [(0, extra) for extra in rest], 0.0
    )
    return pooled / average(counted, list(kernel_sizes), list(strides))


def _windows(
    op: str,
    x: Tensor,
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    pad_type: PadType,
    pad: Sequence[int] | None,
    ceil_mode: bool,
) -> tuple[Pads, list[int]]:
    """Padding before and after each dimension, and what is missing behind it to the last window of ``ceil_mode``.

    With ``ceil_mode`` a last, partial window counts, unless it would start behind the input and its first padding.
    """
    if len(kernel_sizes) != x.ndim - 2 or x.ndim - 2 not in _MAX:
        raise UnsupportedError(f"{op}: of rank {x.ndim} with {len(kernel_sizes)} kernel sizes is not covered")
    if ceil_mode and pad_type in ("same", "same_lower"):
        raise UnsupportedError(f"{op}: ceil_mode with pad_type {pad_type!r} is not covered")
    pads = paddings(pad_type, pad, x.shape[2:], kernel_sizes, strides)
    rest = []
    for size, k, stride, (before, after) in zip(x.shape[2:], kernel_sizes, strides, pads, strict=True):
        span = size + before + after
        count = (span - k) // stride + 1
        if ceil_mode:
            count = -(-(span - k) // stride) + 1
            count -= (count - 1) * stride >= size + before
        rest.append(max(0, (count - 1) * stride + k - span))
    return pads, rest


def _pad(x: Tensor, pads: Pads, value: float) -> Tensor:
    sizes = [size for pair in reversed(pads) for size in pair]
    return F.pad(x, sizes, value=value) if any(sizes) else x
