"""One chain of einsum, softmax, einsum per head, for the Neural Engine.

The layout follows "Deploying Transformers on the Apple Neural Engine" (Apple Machine Learning Research, 2022): the
long axis last, the reduced one in the channels, heads split so that each chain works on small tensors. Both
equations are of the one form that MIL's ``einsum`` has (nchw, nwhu -> nchu), so they stay ``einsum`` operations in
the program: existing apps recognise the split kinds by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.Attend`. The scores of one head are held at once."""
    by_head = split_heads(query, key, value, heads, scale)
    return join([attend_head(*one, mask) for one in by_head], dim=1)


def split_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each head the query (batch, each, 1, queries), the transposed, scaled key (batch, keys, 1, each) and the
    value (batch, each, 1, keys): three splits and one transpose, however many heads there are."""
    sizes = [int(query.shape[1]) // heads] * heads
    # Scaled after the transpose: right after the projection, coremltools would fold the scale into its weights.
    keys = split(key.transpose(1, 3) * scale, sizes, dim=3)
    return zip(split(query, sizes, dim=1), keys, split(value, sizes, dim=1), strict=True)


def attend_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one of `split_heads`; the scores are (batch, keys, 1, queries)."""
    scores = torch.einsum("bkhc,bchq->bkhq", key, query)
    if mask is not None:
        scores = scores + mask
    return torch.einsum("bchk,bkhq->bchq", value, scores.softmax(dim=1))


def split(tensor: torch.Tensor, sizes: Sequence[int], dim: int) -> tuple[torch.Tensor, ...]:
    """One ``split`` operation, or none where there is nothing to split."""
    return torch.split(tensor, list(sizes), dim=dim) if len(sizes) > 1 else (tensor,)


def join(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """One ``concat`` operation, or none where there is nothing to join."""
    return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0]
