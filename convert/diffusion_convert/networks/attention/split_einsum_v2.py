"""`split_einsum` with the query in chunks of 512: smaller scores, which mobile Neural Engines need.

The last chunk is as long as what is left, so every length is right. Other converters leave the remainder out, which
is wrong for all pictures whose latents are not a multiple of 512 positions (768x768, 640x640, 896x896).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion_convert.networks.attention.split_einsum import attend_head, join, split, split_heads
from diffusion_runtime.families import AttentionKind

QUERY_CHUNK = AttentionKind.SPLIT_EINSUM_V2.about.query_chunk or 0


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.Attend`. The scores of one chunk of one head are held at once."""
    sizes = chunk_sizes(int(query.shape[3]))
    masks: Sequence[torch.Tensor | None] = [None] * len(sizes) if mask is None else split(mask, sizes, dim=3)
    by_head = split_heads(query, key, value, heads, scale)
    return join([_attend_in_chunks(*one, masks, sizes) for one in by_head], dim=1)


def chunk_sizes(queries: int, chunk: int = QUERY_CHUNK) -> list[int]:
    """The lengths of the chunks: ``chunk`` each, and the remainder if there is one."""
    return [min(chunk, queries - start) for start in range(0, queries, chunk)]


def _attend_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
) -> torch.Tensor:
    chunks = zip(split(query, sizes, dim=3), masks, strict=True)
    return join([attend_head(chunk, key, value, mask) for chunk, mask in chunks], dim=3)
