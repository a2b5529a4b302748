"""What fused nodes compute: torch's own kernels in place of the chains that a converter makes of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.mil.ops.linear import dense


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Over the channels of each group and all spatial dimensions of (batch, channels, *spatial)."""
    return torch.group_norm(x, groups, weight, bias, epsilon)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    labels: str,
    scale: float,
    heads: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · query keyᵀ + mask) value, for ``heads`` heads that lie one after the other in the channels.

    ``labels`` names the dimensions as an einsum does, "bchq,bkhc,bdhk->bdhq": q and k are queries and keys, c and d
    the channels of keys and values, all other letters are batch. ``mask`` is (*batch, queries, keys), broadcast.
    With more than one head all batch dimensions but the first have size 1.
    """
    query_order, key_order, value_order, out_order = _orders(labels)
    q, k, v = query.permute(query_order), key.permute(key_order), value.permute(value_order)
    batch = q.shape[:-2]
    if heads > 1:
        q, k, v = (_by_head(t, heads) for t in (q, k, v))
        mask = mask.reshape(mask.shape[0], 1, *mask.shape[-2:]) if mask is not None else None
    # torch's fast attention takes rank 4 only: any other goes through its slow path, which holds all scores.
    elif len(batch) != 2:
        q, k, v = (t.reshape(1, math.prod(batch), *t.shape[-2:]) for t in (q, k, v))
        mask = _expanded(mask, batch).reshape(1, math.prod(batch), *mask.shape[-2:]) if mask is not None else None
    mixed = F.scaled_dot_product_attention(dense(q), dense(k), dense(v), mask, scale=scale)
    if heads > 1:
        mixed = mixed.transpose(1, 2).flatten(2)
    return mixed.reshape(*batch, *mixed.shape[-2:]).permute(out_order)


def by_head(query: Tensor, key: Tensor, labels: str, heads: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of `attend` as (*batch, length, channels), heads among the batch."""
    query_order, key_order, *_ = _orders(labels)
    q, k = query.permute(query_order), key.permute(key_order)
    return (_by_head(q, heads), _by_head(k, heads)) if heads > 1 else (q, k)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    padding: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution in channels-last memory; ``x`` is copied only where it lies otherwise."""
    last = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(last, weight, bias, strides, padding, dilations, groups)


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    padding: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d` with a kernel in oneDNN's own order. torch has no public call for it; its compiler's is this one."""
    last = x.contiguous(memory_format=torch.channels_last)
    run: Any = torch.ops.mkldnn._convolution_pointwise
    found: Tensor = run(last, weight, bias, padding, strides, dilations, groups, "none", [], "")
    return found


def add_into(x: Tensor, y: Tensor) -> Tensor:
    """x + y in the memory of ``x``."""
    return x.add_(y)


def multiply_into(x: Tensor, y: Tensor) -> Tensor:
    """x · y in the memory of ``x``."""
    return x.mul_(y)


def silu_into(x: Tensor) -> Tensor:
    """silu(x) in the memory of ``x``."""
    return F.silu(x, inplace=True)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(batch, 1 …, length, heads · each) -> (batch, heads, length, each), no copy."""
    return x.reshape(x.shape[0], x.shape[-2], heads, x.shape[-1] // heads).transpose(1, 2)


def _expanded(mask: Tensor, batch: Sequence[int]) -> Tensor:
    return mask.expand(*batch, *mask.shape[-2:])


@functools.lru_cache(maxsize=256)
def _orders(labels: str) -> tuple[tuple[int, ...], ...]:
    """For each operand the permutation to (*batch, length, channels), and the one from there to the result."""
    operands, result = labels.split("->")
    query, key, value = operands.split(",")
    batch = "".join(letter for letter in query if letter not in "qc")
    wanted = (batch + "qc", batch + "kc", batch + "kd")
    operands_in_order = zip((query, key, value), wanted, strict=True)
    orders = [tuple(given.index(letter) for letter in order) for given, order in operands_in_order]
    mixed = batch + "qd"
    return (*orders, tuple(mixed.index(letter) for letter in result))
