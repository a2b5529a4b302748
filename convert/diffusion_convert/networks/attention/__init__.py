"""Attention kinds: pure functions over (batch, channels, 1, length).

To add one: a file here with `attend`, and an entry of its name in `diffusion_runtime.families`."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch

from diffusion_runtime.families import AttentionKind


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
    kind: import_module(f"{__name__}.{kind.value}").attend for kind in AttentionKind
}
