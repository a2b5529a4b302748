"""The network of all projections of IP-Adapters: diffusers' own modules, each made from its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

TOKENS = "tokens"


class Projections(nn.Module):
    """``layers``: of each adapter, what makes its tokens of what CLIP says of a picture."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Projections:
        """``projections``: of each its ``kind`` ("plain", "plus" or "full"), the width of what it takes (``embed``)
        and gives (``width``), its ``tokens``; a resampler's ``hidden`` width and ``heads``."""
        return cls([KINDS[one["kind"]](one) for one in config["projections"]])


def _plain(one: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.embeddings import ImageProjection

    made: nn.Module = ImageProjection(one["embed"], one["width"], one[TOKENS])
    return made


def _full(one: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.embeddings import IPAdapterFullImageProjection

    made: nn.Module = IPAdapterFullImageProjection(one["embed"], one["width"])
    return made


def _plus(one: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    made: nn.Module = IPAdapterPlusImageProjection(
        embed_dims=one["embed"],
        output_dims=one["width"],
        hidden_dims=one["hidden"],
        heads=one["heads"],
        num_queries=one[TOKENS],
    )
    return made


KINDS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {"plain": _plain, "plus": _plus, "full": _full}
