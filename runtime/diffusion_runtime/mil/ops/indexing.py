"""Ops whose result depends on indices: gather, scatter, sort, fill, masks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import Int, Ints, ints, mil_op, positive

ScatterMode = Literal["update", "add", "sub", "mul", "div", "max", "min"]
_REDUCE = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}


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


@mil_op("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: ScatterMode = "add",
    validate_indices: bool = False,
) -> Tensor:
    """``indices`` is a vector of places along ``axis``."""
    axis = positive(axis, data.ndim)
    return _combine(data, axis, _from_front(indices, data.shape[axis]), updates, mode, "scatter")


@mil_op("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: ScatterMode = "add",
    validate_indices: bool = False,
) -> Tensor:
    """``indices`` has the rank of ``data`` and the shape of ``updates``."""
    axis = positive(axis, data.ndim)
    grid = torch.meshgrid(*[torch.arange(size, device=data.device) for size in indices.shape], indexing="ij")
    places = list(grid)
    places[axis] = _from_front(indices, data.shape[axis])
    flat = _combine(
        data.reshape(-1),
        0,
        _linear(places, data.shape).reshape(-1),
        updates.reshape(-1),
        mode,
        "scatter_along_axis",
    )
    return flat.reshape(data.shape)


@mil_op("scatter_nd")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: ScatterMode = "add", validate_indices: bool = False
) -> Tensor:
    """The last dimension of ``indices`` holds coordinates in the first dimensions of ``data``."""
    depth = indices.shape[-1]
    leading = data.shape[:depth]
    places = [_from_front(index, size) for index, size in zip(indices.unbind(-1), leading, strict=True)]
    rows = data.reshape(math.prod(leading), -1)
    new = updates.reshape(-1, rows.shape[1])
    return _combine(rows, 0, _linear(places, leading).reshape(-1), new, mode, "scatter_nd").reshape(data.shape)


def _linear(places: list[Tensor], shape: torch.Size) -> Tensor:
    index = places[0]
    for place, size in zip(places[1:], shape[1:], strict=True):
        index = index * size + place
    return index


def _combine(data: Tensor, axis: int, index: Tensor, updates: Tensor, mode: ScatterMode, op: str) -> Tensor:
    if mode == "update":
        return data.index_copy(axis, index, updates)
    if mode in ("add", "sub"):
        return data.index_add(axis, index, updates, alpha=1 if mode == "add" else -1)
    if mode == "div":
        if not data.is_floating_point():
            raise UnsupportedError(f"{op}: mode 'div' of integers is not covered")
        updates = updates.reciprocal()
    place = index.reshape(-1, *[1] * (updates.ndim - axis - 1)).expand(updates.shape)
    return data.scatter_reduce(axis, place, updates, _REDUCE[mode])


@mil_op("topk")
def topk(
    x: Tensor,
    k: Int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """Largest values first (``ascending``: smallest) and where they were; of equal ones the first."""
    count = int(k)
    values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    values = values.narrow(axis, 0, count)
    return (values, indices.narrow(axis, 0, count).int()) if return_indices else (values,)


@mil_op("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).int()


@mil_op("non_zero")
def non_zero(x: Tensor) -> Tensor:
    """(count, rank): the coordinates of all elements that are not zero."""
    return torch.nonzero(x).int()


@mil_op("one_hot")
def one_hot(
    indices: Tensor,
    one_hot_vector_size: Int,
    out_dtype: torch.dtype,
    axis: int = -1,
    on_value: float = 1,
    off_value: float = 0,
) -> Tensor:
    classes = torch.arange(int(one_hot_vector_size), device=indices.device)
    hot = indices.unsqueeze(-1) == classes
    on, off = (torch.tensor(value, dtype=out_dtype, device=indices.device) for value in (on_value, off_value))
    return torch.where(hot, on, off).movedim(-1, axis)


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


@mil_op("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """``exclusive``: each sum leaves its own element out; ``reverse``: from the end on."""
    if reverse:
        x = x.flip(axis)
    total = torch.cumsum(x, axis, dtype=x.dtype)
    if exclusive:
        total = total.roll(1, axis)
        total.select(axis, 0).zero_()
    return total.flip(axis) if reverse else total


@mil_op("fill")
def fill(shape: Ints, out_dtype: torch.dtype, value: float = 0.0) -> Tensor:
    device = shape.device if isinstance(shape, Tensor) else None
    return torch.full(ints(shape), value, dtype=out_dtype, device=device)


@mil_op("fill_like")
def fill_like(ref_tensor: Tensor, out_dtype: torch.dtype, value: float = 0.0) -> Tensor:
    return torch.full(ref_tensor.shape, value, dtype=out_dtype, device=ref_tensor.device)


@mil_op("range_1d")
def range_1d(end: Tensor, start: Tensor, step: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=out_dtype, device=end.device)
