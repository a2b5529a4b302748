"""The projections of IP-Adapters: of what the image encoder says of pictures, tokens that the UNet attends to."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.ip_adapter import patches
from diffusion_convert.checkpoint.ip_projections import TOKENS, Projections
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.picture_prompts import projection
from diffusion_runtime.families import AttentionKind


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:  # noqa: ARG001
    network: Any = torch_networks.build(checkpoint, "image_projection")
    attend = None if attention is None else ATTENTION[attention]
    adapters = checkpoint.models["image_projection"].config["projections"]
    inputs = tuple(
        Port(f"image_embeds_{index}", _taken(checkpoint, one), description=f"Of the picture of {named.name}")
        for index, (one, named) in enumerate(zip(adapters, checkpoint.ip_adapters, strict=True))
    )
    outputs = tuple(
        Port(f"image_tokens_{index}", (1, one["width"], 1, one[TOKENS]), "float32", f"Tokens of {named.name}")
        for index, (one, named) in enumerate(zip(adapters, checkpoint.ip_adapters, strict=True))
    )

    def draw(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {port.name: rng.standard_normal(port.shape).astype(port.dtype) for port in inputs}

    return Graph(
        module=Projections([projection(layer, attend) for layer in network.layers]).eval(),
        inputs=inputs,
        outputs=outputs,
        sample=draw,
        description="Makes of encoded pictures the tokens that the UNet attends to beside its prompt.",
    )


def _taken(checkpoint: Checkpoint, one: dict[str, Any]) -> tuple[int, ...]:
    """As the image encoder gives it: the whole picture's, or that of each patch."""
    states = patches(checkpoint.models["image_encoder"])
    return (1, one["embed"]) if one["kind"] == "plain" else (1, states, one["embed"])


IMAGE_PROJECTION = Component(
    name="image_projection",
    build=build,
    min_psnr_db=60.0,
    one_size=True,
)
