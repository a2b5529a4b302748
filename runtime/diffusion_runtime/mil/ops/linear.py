"""Products of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.mil.ops.registry import mil_op


@mil_op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@mil_op("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    if transpose_x and x.ndim > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.ndim > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


@mil_op("einsum")
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@mil_op("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(query key^T / sqrt(width) + mask) value over (batch, ..., length, width)."""
    return F.scaled_dot_product_attention(dense(query), dense(key), dense(value), attn_mask)


def dense(x: Tensor) -> Tensor:
    """torch's fast attention wants the channels of one position side by side: otherwise it holds all scores."""
    return x if x.stride(-1) == 1 else x.contiguous()
