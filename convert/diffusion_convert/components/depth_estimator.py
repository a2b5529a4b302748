"""The depth estimator of SD 2 depth: a picture to how near everything in it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.components.vae_encoder import plain_patches
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.depth import DepthEstimator
from diffusion_runtime.families import AttentionKind

PLAIN_SIZE = 16
"""Side in pixels of the plain patches in a made-up picture: that of the transformer's."""


class Reference(nn.Module):
    """transformers' DPTForDepthEstimation: pixel_values (1, 3, size, size) -> predicted_depth (1, size, size)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        depth: torch.Tensor = self.model(pixel_values).predicted_depth
        return depth


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:  # noqa: ARG001
    model: Any = torch_networks.build(checkpoint, "depth_estimator")
    size = int(model.config.image_size)
    channels = int(model.config.num_channels)
    pixels = (1, channels, size, size)
    return Graph(
        module=Reference(model) if attention is None else DepthEstimator(model, ATTENTION[attention]).eval(),
        inputs=(Port("pixel_values", pixels, description="The picture, resized, in -1..1"),),
        outputs=(Port("predicted_depth", (1, size, size), "float32", "Inverse depth: the larger, the nearer"),),
        sample=lambda seed: {"pixel_values": plain_patches(pixels, PLAIN_SIZE, seed).astype(np.float16)},
        description="Estimates how near everything in a picture is.",
    )


DEPTH_ESTIMATOR = Component(
    name="depth_estimator",
    build=build,
    min_psnr_db=60.0,
    one_size=True,
)
