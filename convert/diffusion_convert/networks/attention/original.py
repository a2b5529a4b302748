"""All heads in one batched product, for the GPU. Rank 4 throughout: newer GPU drivers crash on rank-3 attention."""

from __future__ import annotations

import torch


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
    keys = int(key.shape[3])
    each = channels // heads
    query = query.reshape(batch, heads, each, queries)
    # Scaled after the reshape: right after the projection, coremltools would fold the scale into its weights.
    key = key.reshape(batch, heads, each, keys) * scale
    scores = query.transpose(2, 3) @ key
    if mask is not None:
        scores = scores + mask.permute(0, 2, 3, 1)
    mixed = value.reshape(batch, heads, each, keys) @ scores.softmax(dim=3).transpose(2, 3)
    return mixed.reshape(batch, channels, 1, queries)
