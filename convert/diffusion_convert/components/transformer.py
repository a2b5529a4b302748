"""Stable Diffusion 3's transformer: one denoising step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.family import latent_factor, text_length
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.components.unet import TIMESTEPS
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.mmdit import TIME_PROJECTION, HeadNorm, Transformer
from diffusion_runtime.families import MMDIT, AttentionKind

SAMPLE, STATES, POOLED = MMDIT.names.values()


class Reference(nn.Module):
    """diffusers' SD3Transformer2DModel with the interface of the Core ML model."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, latents: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        predicted: torch.Tensor = self.network(
            latents, states.squeeze(2).transpose(1, 2), pooled.flatten(1), timestep, return_dict=False
        )[0]
        return predicted


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    network = torch_networks.build(checkpoint, "transformer")
    inputs = interface(checkpoint, shape)
    sample = inputs[0].shape
    channels = int(checkpoint.models["transformer"].config["out_channels"] or sample[1])
    size = sample[2], sample[3]
    module: nn.Module = Reference(network)
    if attention is not None:
        module = Transformer(network, ATTENTION[attention], size).eval()
    return Graph(
        module=module,
        inputs=inputs,
        outputs=(Port("denoiser_output", (sample[0], channels, *size), "float32", "The prediction"),),
        sample=lambda seed: _draw(inputs, seed),
        description="Predicts, from noised latents and encoded prompts, what the scheduler takes away in one step.",
        # Squares of queries and keys, whose norm is taken because they grow large, leave float16's range.
        exact=(TIME_PROJECTION, *(name for name, part in module.named_modules() if isinstance(part, HeadNorm))),
    )


def interface(checkpoint: Checkpoint, shape: Shape) -> tuple[Port, ...]:
    """The inputs that Apple's StableDiffusion3Pipeline fills, in Argmax's order."""
    config = checkpoint.models["transformer"].config
    factor = latent_factor(checkpoint.models["vae"].config)
    batch, width = shape.batch_size, int(config["joint_attention_dim"])
    size = (batch, int(config["in_channels"]), shape.height // factor, shape.width // factor)
    tokens = shape.context_length or 2 * text_length(checkpoint)
    return (
        Port(SAMPLE, size, description="Noised latents"),
        Port(
            STATES, (batch, width, 1, tokens), description="The text encoders' states: CLIP's, then T5's or zeros"
        ),
        Port(
            POOLED,
            (batch, int(config["pooled_projection_dim"]), 1, 1),
            description="The CLIP encoders' pooled_outputs, one after the other",
        ),
        # Flow matching's timesteps lie between whole numbers, up to 1000: float16 would round them to halves.
        Port("timestep", (batch,), "float32", "The timestep of each row, 0 to 1000"),
    )


def _draw(inputs: tuple[Port, ...], seed: int) -> Mapping[str, np.ndarray]:
    """Latents and states of unit variance, each row with a timestep of its own."""
    rng = np.random.default_rng(seed)
    arrays = {port.name: rng.standard_normal(port.shape) for port in inputs}
    batch = inputs[0].shape[0]
    arrays["timestep"] = np.array([TIMESTEPS[(seed * batch + row) % len(TIMESTEPS)] + 0.3 for row in range(batch)])
    return {port.name: arrays[port.name].astype(port.dtype) for port in inputs}


TRANSFORMER = Component(
    name="transformer",
    build=build,
    min_psnr_db=60.0,
    uses_attention=True,
    runs=2,
    palettized=True,
)
