"""Attention kinds: pure functions over (batch, channels, 1, length). To add one: a file, an enum member, a line."""

from __future__ import annotations

from typing import Protocol

import torch

from diffusion_convert.networks.attention import original, split_einsum, split_einsum_v2
from diffusion_convert.options import AttentionKind


class Attend(Protocol):
    """Multi-head attention, value · softmax(scale · keyᵀ query + mask) for every head.

    ``query`` is (batch, channels, 1, queries); ``key`` and ``value`` are (batch, channels, 1, keys), with the heads
    one after the other in the channels. ``mask`` is added to the scores: (1 or batch, keys, 1, queries). The result
    has the shape of ``query``.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: int,
        scale: float,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


ATTENTION: dict[AttentionKind, Attend] = {
    AttentionKind.ORIGINAL: original.attend,
    AttentionKind.SPLIT_EINSUM: split_einsum.attend,
    AttentionKind.SPLIT_EINSUM_V2: split_einsum_v2.attend,
}
