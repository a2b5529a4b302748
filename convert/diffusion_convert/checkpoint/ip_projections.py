"""The network of all projections of IP-Adapters: diffusers' own modules, each made from its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
        return cls(list(map(_layer, config["projections"])))

    def forward(self, *pictures: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = tuple(layer(picture) for layer, picture in zip(self.layers, pictures, strict=True))
        return found if len(found) > 1 else found[0]


def _layer(one: Mapping[str, Any]) -> nn.Module:
    from diffusers.models import embeddings

    embed, width = one["embed"], one["width"]
    made: nn.Module
    if one["kind"] == "plain":
        made = embeddings.ImageProjection(embed, width, one[TOKENS])
    elif one["kind"] == "full":
        made = embeddings.IPAdapterFullImageProjection(embed, width)
    else:
        made = embeddings.IPAdapterPlusImageProjection(
            embed_dims=embed,
            output_dims=width,
            hidden_dims=one["hidden"],
            heads=one["heads"],
            num_queries=one[TOKENS],
        )
    return made
