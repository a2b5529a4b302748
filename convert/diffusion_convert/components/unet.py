"""The UNet: one denoising step."""

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
from diffusion_convert.components.text_encoder import Reference, prompt_ids
from diffusion_convert.networks import put_attention
from diffusion_convert.verification.compare import widened
from diffusion_runtime.families import AttentionKind

TIMESTEPS = (999, 1, 801, 201, 601, 401)
"""Where verification looks, in this order: the ends first, where values are largest."""


class UNet(nn.Module):
    """diffusers' UNet with the interface of the Core ML model: states are (batch, width, 1, tokens).

    ``channels_first``: the transformers inside take them so, too.
    """

    def __init__(self, network: Any, channels_first: bool) -> None:
        super().__init__()
        self.unet = network
        self.channels_first = channels_first
        self.embeds_labels = isinstance(getattr(network, "class_embedding", None), nn.Embedding)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        states = encoder_hidden_states
        if not self.channels_first:
            states = states.squeeze(2).transpose(1, 2)
        labels = class_labels.to(torch.int32) if class_labels is not None and self.embeds_labels else class_labels
        noise: torch.Tensor = self.unet(sample, timestep, states, class_labels=labels, return_dict=False)[0]
        return noise


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    network = torch_networks.build(checkpoint, "unet")
    if attention is not None:
        put_attention(network, attention)
    config = checkpoint.models["unet"].config
    inputs = interface(checkpoint, shape)
    sample = inputs[0].shape
    return Graph(
        module=UNet(network, channels_first=attention is not None),
        inputs=inputs,
        outputs=(
            Port("noise_pred", (sample[0], int(config["out_channels"]), *sample[2:]), "float32", "The prediction"),
        ),
        sample=lambda seed: _draw(checkpoint, inputs, seed),
        description="Predicts, from noised latents and encoded prompts, what the scheduler takes away in one step.",
        exact=("unet.time_proj",),
    )


def interface(checkpoint: Checkpoint, shape: Shape) -> tuple[Port, ...]:
    """The UNet's inputs. Row 0 is of the unconditional half where the batch has two."""
    config = checkpoint.models["unet"].config
    factor = latent_factor(checkpoint.models["vae"].config)
    batch, width = shape.batch_size, int(config["cross_attention_dim"])
    tokens = shape.context_length or text_length(checkpoint)
    size = (batch, int(config["in_channels"]), shape.height // factor, shape.width // factor)
    ports = (
        Port("sample", size, description="Noised latents, and after them the channels of a picture to work from"),
        Port("timestep", (batch,), description="The timestep of each row"),
        Port(
            "encoder_hidden_states", (batch, width, 1, tokens), description="The text encoder's states, transposed"
        ),
    )
    if config.get("num_class_embeds") is None and config.get("class_embed_type") is None:
        return ports
    return (*ports, Port("class_labels", (batch,), description="How much noise the picture was given"))


def _draw(checkpoint: Checkpoint, inputs: tuple[Port, ...], seed: int) -> Mapping[str, np.ndarray]:
    """Latents of unit variance, each row with a timestep and a prompt of its own."""
    rng = np.random.default_rng(seed)
    config = checkpoint.models["unet"].config
    sample, batch = inputs[0].shape, inputs[0].shape[0]
    latents = rng.standard_normal(sample)
    latent_channels = int(config["out_channels"])
    if sample[1] == latent_channels + 1 + latent_channels:
        latents[:, latent_channels] = rng.random(sample[2:]) < 0.5  # the mask
    elif sample[1] != latent_channels:
        latents[:, latent_channels:] = np.clip(latents[:, latent_channels:], -1, 1)  # a depth, a small picture
    steps = [TIMESTEPS[(seed * batch + row) % len(TIMESTEPS)] for row in range(batch)]
    arrays = {
        "sample": latents,
        "timestep": np.array(steps),
        "encoder_hidden_states": _encode(checkpoint, inputs[2].shape, seed),
        "class_labels": rng.integers(0, 350, batch),
    }
    return {port.name: arrays[port.name].astype(port.dtype) for port in inputs}


def _encode(checkpoint: Checkpoint, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """(batch, width, 1, tokens) states of made-up prompts from the checkpoint's own text encoder, where it has one
    that fits: the first states are a hundred times larger than the rest."""
    config = checkpoint.models["text_encoder"].config if "text_encoder" in checkpoint.models else {}
    if config.get("hidden_size") != shape[1]:
        return np.random.default_rng(seed).standard_normal(shape)
    encoder, length = Reference(torch_networks.build(checkpoint, "text_encoder")), text_length(checkpoint)
    pieces = shape[0] * shape[3] // length
    with widened(encoder), torch.inference_mode():
        states = [
            encoder(torch.from_numpy(prompt_ids(config, seed * pieces + piece, length)))[0].numpy()[0]
            for piece in range(pieces)
        ]
    rows: np.ndarray = np.concatenate(states).reshape(shape[0], shape[3], shape[1])
    return rows.transpose(0, 2, 1)[:, :, None]


UNET = Component(
    name="unet",
    build=build,
    min_psnr_db=60.0,
    uses_attention=True,
    runs=2,
    palettized=True,
)
