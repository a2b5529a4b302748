"""Reductions over axes. No axes means all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_runtime.mil.ops.registry import mil_op


def _all(x: Tensor, axes: Sequence[int] | None) -> list[int]:
    return list(range(x.ndim)) if axes is None else list(axes)


@mil_op("reduce_l2_norm")
def reduce_l2_norm(x: Tensor, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Tensor:
    return (x * x).sum(_all(x, axes), keep_dims).sqrt()


@mil_op("reduce_max")
def reduce_max(x: Tensor, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Tensor:
    return torch.amax(x, _all(x, axes), keep_dims)


@mil_op("reduce_sum")
def reduce_sum(x: Tensor, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.sum(_all(x, axes), keep_dims, dtype=x.dtype)


@mil_op("reduce_mean")
def reduce_mean(x: Tensor, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Tensor:
    """The mean of integers drops its fraction."""
    if x.is_floating_point():
        return _mean(x, _all(x, axes), keep_dims)
    return x.double().mean(_all(x, axes), keep_dims).to(x.dtype)


def _mean(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    """Over a group's channels and all pixels, where channels lie last, torch takes ten times as long as over the
    pixels and then over the channels. (16 bits would be rounded between.)"""
    if x.dtype == torch.float32 and len(axes) > 1:
        nearest = min(axes, key=x.stride)
        if nearest % x.ndim != max(axis % x.ndim for axis in axes):
            x = x.mean([axis for axis in axes if axis != nearest], True)
    return x.mean(axes, keep_dims)


@mil_op("reduce_argmax")
def reduce_argmax(
    x: Tensor, out_dtype: torch.dtype, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    """Of equal elements the first; ``output_dtype`` is what ``out_dtype`` says as well."""
    return torch.argmax(x, axis, keep_dims).to(out_dtype)
