"""A T2I-Adapter: of a picture that steers, once, what is added to the UNet's features in every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.t2i_adapter import feature_shapes
from diffusion_convert.components.component import Build, Component, Graph, Port, Shape
from diffusion_convert.components.conditions import FEATURE
from diffusion_runtime.families import AttentionKind

PICTURE = "image"


class Unshuffle(nn.Module):
    """nn.PixelUnshuffle in operations of rank 4, which every target has: (1, channels, height, width) to (1,
    channels · factor², height / factor, width / factor)."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, channels, height, width = (int(size) for size in x.shape)
        by, high, wide = self.factor, height // self.factor, width // self.factor
        rows = x.reshape(channels, high, by, width).transpose(1, 2)
        columns = rows.reshape(channels * by, high, wide, by).permute(0, 3, 1, 2)
        return columns.reshape(1, channels * by * by, high, wide)


class Adapter(nn.Module):
    """diffusers' T2IAdapter: a picture (1, channels, height, width) in 0..1 -> its features."""

    def __init__(self, network: Any, unshuffles: bool) -> None:
        super().__init__()
        if unshuffles:
            network.adapter.unshuffle = Unshuffle(int(network.downscale_factor))
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network(image))


def build_of(name: str) -> Build:
    """The build of the adapter that is called so in the checkpoint."""

    def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
        submodel = checkpoint.models[name]
        channels = int(submodel.config.get("in_channels", 3))
        size = (1, channels, shape.height, shape.width)
        shapes = feature_shapes(submodel, shape.height, shape.width, name)
        return Graph(
            module=Adapter(torch_networks.build(checkpoint, name), attention is not None),
            inputs=(Port(PICTURE, size, description="The picture that steers, from 0 to 1"),),
            outputs=tuple(
                Port(f"{FEATURE}{number}", one, "float32", "What is added to the UNet's features")
                for number, one in enumerate(shapes)
            ),
            sample=lambda seed: {PICTURE: np.random.default_rng(seed).random(size).astype(np.float16)},
            description="Gives, for a picture that steers, what is added to the UNet's features in every step.",
        )

    return build


T2I_ADAPTER = Component(
    name="t2i_adapter",
    build=build_of("t2i_adapter"),
    build_of=build_of,
    min_psnr_db=60.0,
    palettized=True,
)
