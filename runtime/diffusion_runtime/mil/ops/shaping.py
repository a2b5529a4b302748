"""Ops that move elements and compute none: reshape, transpose, slices, concat, pad, gather …"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import Ints, check_count, ints, mil_op, positive


@mil_op("reshape")
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """-1 stands for what is left, 0 for the size of the same dimension of ``x``."""
    sizes = ints(shape)
    if 0 in sizes and x.numel():
        if len(sizes) != x.ndim:
            raise UnsupportedError(f"reshape: shape {sizes} inherits a dimension from a tensor of rank {x.ndim}")
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@mil_op("transpose")
def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    return x.permute(*perm)


@mil_op("expand_dims")
def expand_dims(x: Tensor, axes: Sequence[int]) -> Tensor:
    """``axes`` count in the result."""
    for axis in sorted(positive(axis, x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@mil_op("squeeze")
def squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Dimensions of another size than 1 stay."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@mil_op("concat")
def concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """Scalars become a vector; ``interleave`` takes one element of each tensor in turn."""
    if values[0].ndim == 0:
        return torch.stack(list(values))
    if interleave:
        axis = positive(axis, values[0].ndim)
        return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)
    return torch.cat(list(values), axis)


@mil_op("split")
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return torch.functional.split(x, list(split_sizes), axis)
    if num_splits is None or x.shape[axis] % num_splits:
        raise UnsupportedError(f"split: of size {x.shape[axis]} in {num_splits} parts is not covered")
    return torch.functional.split(x, x.shape[axis] // num_splits, axis)


@mil_op("tile")
def tile(x: Tensor, reps: Ints) -> Tensor:
    check_count("tile", x.numel() * math.prod(ints(reps)))
    return x.tile(ints(reps))


@mil_op("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:
    """As Python slices, one per dimension; a masked begin or end is left out, ``squeeze_mask`` indexes instead."""
    slices = _slices(x, ints(begin), ints(end), stride, begin_mask, end_mask, squeeze_mask)
    backwards = [axis for axis, item in enumerate(slices) if isinstance(item, slice) and item.step < 0]
    for axis in backwards:
        indices = range(*slices[axis].indices(x.shape[axis]))  # type: ignore[union-attr]
        slices[axis] = slice(None)
        x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64, device=x.device))
    return x[tuple(slices)]


def _slices(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: Sequence[int] | None,
    begin_mask: Sequence[bool] | None,
    end_mask: Sequence[bool] | None,
    squeeze_mask: Sequence[bool] | None,
) -> list[slice | int]:
    none = [False] * x.ndim
    rows = zip(
        begin,
        end,
        stride or [1] * x.ndim,
        begin_mask or none,
        end_mask or none,
        squeeze_mask or none,
        strict=True,
    )
    return [
        (0 if no_begin else first)
        if index
        else slice(None if no_begin else first, None if no_end else last, int(step))
        for first, last, step, no_begin, no_end, index in rows
    ]


@mil_op("pad")
def pad(
    x: Tensor, pad: Ints, mode: Literal["constant", "reflect", "replicate"] = "constant", constant_val: float = 0.0
) -> Tensor:
    """``pad`` holds (before, after) of the last dimensions, in their order."""
    sizes = ints(pad)
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    widened = [size + sum(pair) for size, pair in zip(x.shape[x.ndim - len(pairs) :], pairs, strict=True)]
    check_count("pad", math.prod(x.shape[: x.ndim - len(pairs)]) * math.prod(widened))
    if mode == "constant":
        return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, start=x.ndim - len(pairs)):
        if before or after:
            last = x.shape[axis] - 1
            if mode == "reflect" and max(before, after) > last:
                raise UnsupportedError(
                    f"pad: reflecting {max(before, after)} elements of {last + 1} is not covered"
                )
            index = torch.arange(-before, last + 1 + after, device=x.device)
            index = (last - (last - index.abs()).abs()) if mode == "reflect" else index.clamp(0, last)
            x = x.index_select(axis, index)
    return x


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
