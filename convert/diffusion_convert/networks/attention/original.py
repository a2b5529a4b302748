"""All heads in one batched product, for the GPU. Rank 4 throughout: newer GPU drivers crash on rank-3 attention.

The weights after the softmax are the first factor of their product, never transposed: as the second, transposed,
they abort deep programs on the GPU of macOS 26 (ultralytics/ultralytics#25860). From macOS 15 / iOS 18 on,
coremltools makes one operation of it, for older targets two products around a softmax.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

MASKED_BATCH = 10
"""Batches from which on that one operation, with a mask, is wrong on the GPU (apple/coremltools#2650)."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.Attend`. The scores of all heads, (batch, heads, queries, keys), are held at once."""
    # int(): a size that the tracer follows becomes a chain of shape operations in the program.
    batch, channels, _, queries = (int(size) for size in query.shape)
    each = channels // heads
    q, k, v = (x.reshape(batch, heads, each, int(x.shape[3])).transpose(2, 3) for x in (query, key, value))
    # coremltools makes one operation of it only where the scale is the operation's own, 1/sqrt(each).
    own = 1 / math.sqrt(each)
    if not math.isclose(scale, own):
        q = q * (scale / own)
    bias = None if mask is None else mask.permute(0, 2, 3, 1)
    if bias is not None and batch >= MASKED_BATCH:
        mixed = ((q * own) @ k.transpose(2, 3) + bias).softmax(dim=3) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, bias)
    return mixed.transpose(2, 3).reshape(batch, channels, 1, queries)
