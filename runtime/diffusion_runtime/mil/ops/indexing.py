"""Ops whose result depends on indices: gather, fill, masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion_runtime.mil.ops.registry import Ints, check_count, ints, mil_op, positive


def _from_front(indices: Tensor, size: int) -> Tensor:
    """int64 indices with negative ones counted from the end."""
    wide = indices.long()
    return torch.where(wide < 0, wide + size, wide)


@mil_op("gather")
def gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """Dimension ``axis`` of ``x`` is replaced by the dimensions of ``indices`` after the ``batch_dims`` first."""
    axis = positive(axis, x.ndim)
    index = _from_front(indices, x.shape[axis])
    shape = (*x.shape[:axis], *index.shape[batch_dims:], *x.shape[axis + 1 :])
    if batch_dims == 0:
        return x.index_select(axis, index.reshape(-1)).reshape(shape)
    batch, before = math.prod(x.shape[:batch_dims]), math.prod(x.shape[batch_dims:axis])
    after = math.prod(x.shape[axis + 1 :])
    rows = index.reshape(batch, 1, -1, 1).expand(batch, before, -1, after)
    return x.reshape(batch, before, x.shape[axis], after).gather(2, rows).reshape(shape)


@mil_op("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return x.gather(axis, _from_front(indices, x.shape[axis]))


@mil_op("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last dimension of ``indices`` holds coordinates in the dimensions of ``x`` behind ``batch_dims``."""
    index = indices.long()
    batch = x.shape[:batch_dims]
    rank = index.ndim - 1
    leading = [
        torch.arange(size, device=x.device).reshape(*[1] * axis, -1, *[1] * (rank - axis - 1))
        for axis, size in enumerate(batch)
    ]
    return x[(*leading, *index.unbind(-1))]


@mil_op("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zero outside of ``lower`` sub-diagonals and ``upper`` super-diagonals; negative: all are kept."""
    rows = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
    columns = torch.arange(x.shape[-1], device=x.device)
    kept = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    if lower >= 0:
        kept &= rows - columns <= lower
    if upper >= 0:
        kept &= columns - rows <= upper
    return torch.where(kept, x, torch.zeros_like(x))


@mil_op("fill")
def fill(shape: Ints, out_dtype: torch.dtype, value: float = 0.0) -> Tensor:
    device = shape.device if isinstance(shape, Tensor) else None
    check_count("fill", math.prod(ints(shape)))
    return torch.full(ints(shape), value, dtype=out_dtype, device=device)


@mil_op("range_1d")
def range_1d(end: Tensor, start: Tensor, step: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_count("range_1d", (end.item() - start.item()) / (step.item() or 1))
    return torch.arange(start.item(), end.item(), step.item(), dtype=out_dtype, device=end.device)
