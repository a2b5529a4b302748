"""Ops whose result depends on indices: gather, fill, masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion_runtime.mil.ops.registry import mil_op, positive


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
