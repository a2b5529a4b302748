"""The image encoder of IP-Adapters, CLIP's: a picture to what their projections make tokens of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.ip_adapter import PROJECTIONS, patches
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.picture_prompts import ImageEncoder
from diffusion_runtime.families import AttentionKind


class Reference(nn.Module):
    """transformers' CLIPVisionModelWithProjection, giving what `picture_prompts.ImageEncoder` gives."""

    def __init__(self, model: Any, gives: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.gives = gives
        # transformers rounds pictures to the type of these weights, whatever they are then computed in.
        model.vision_model.embeddings.patch_embedding.float()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = self.model(pixel_values, output_hidden_states=True)
        values = {"image_embeds": found.image_embeds, "hidden_states": found.hidden_states[-2]}
        given = tuple(values[name] for name in self.gives)
        return given if len(given) > 1 else given[0]


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:  # noqa: ARG001
    model: Any = torch_networks.build(checkpoint, "image_encoder")
    config = model.config
    size = int(config.image_size)
    kinds = {one["kind"] for one in checkpoint.models[PROJECTIONS].config["projections"]}
    ports = (
        Port(
            "image_embeds", (1, int(config.projection_dim)), "float32", "The projected state of the whole picture"
        ),
        Port(
            "hidden_states",
            (1, patches(checkpoint.models["image_encoder"]), int(config.hidden_size)),
            "float32",
            "The states of all patches, before the last layer",
        ),
    )
    wanted = (["image_embeds"] if "plain" in kinds else []) + (["hidden_states"] if kinds - {"plain"} else [])
    outputs = tuple(port for port in ports if port.name in wanted)
    gives = tuple(port.name for port in outputs)
    pixels = (1, int(config.num_channels), size, size)
    return Graph(
        module=Reference(model, gives)
        if attention is None
        else ImageEncoder(model, ATTENTION[attention], gives).eval(),
        inputs=(
            Port(
                "pixel_values", pixels, description="The picture, resized and normalised as CLIP's processor does"
            ),
        ),
        outputs=outputs,
        sample=lambda seed: {
            "pixel_values": np.random.default_rng(seed).standard_normal(pixels).astype(np.float16),
        },
        description="Encodes a picture for IP-Adapters, once for a picture.",
    )


IMAGE_ENCODER = Component(
    name="image_encoder",
    build=build,
    min_psnr_db=60.0,
    runs=2,
    palettized=True,
    one_size=True,
)
