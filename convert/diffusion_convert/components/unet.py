"""The UNet: one denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import folding, torch_networks
from diffusion_convert.checkpoint.family import latent_factor, latent_scale, text_length
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.components.conditions import (
    CONDITIONS,
    Asked,
    Condition,
    Drawing,
    Taken,
    arguments,
    draw,
    taken,
)
from diffusion_convert.components.text_encoder import prompt_ids, reference
from diffusion_convert.networks import put_attention
from diffusion_convert.networks.folding import Epsilon
from diffusion_convert.verification.compare import widened
from diffusion_runtime.families import AttentionKind

TIMESTEPS = (999, 1, 801, 201, 601, 401)
"""Where verification looks, in this order: the ends first, where values are largest."""
EXACT = ("time_proj", "add_time_proj")
"""Sines of timesteps and of sizes in pixels: float16 has no room for their phase."""


class UNet(nn.Module):
    """diffusers' UNet with the interface of the Core ML model: states are (batch, width, 1, tokens).

    ``channels_first``: the transformers inside take them so, too. ``conditions`` are, in order, the inputs that
    follow the states. ``epsilon`` makes noise of what the network predicts.
    """

    def __init__(
        self, network: Any, channels_first: bool, conditions: Sequence[Taken], epsilon: Epsilon | None = None
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.unet = network
        self.channels_first = channels_first
        self.conditions = tuple(conditions)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *conditions: torch.Tensor,
    ) -> torch.Tensor:
        noise: torch.Tensor = self.unet(
            sample,
            timestep,
            as_network_takes(encoder_hidden_states, self.channels_first),
            **arguments(self.unet, self.conditions, conditions),
            return_dict=False,
        )[0]
        return noise if self.epsilon is None else self.epsilon(noise, sample, timestep)


def as_network_takes(states: torch.Tensor, channels_first: bool) -> torch.Tensor:
    """States (batch, width, 1, tokens) as diffusers' own transformers take them, or as ours do."""
    return states if channels_first else states.squeeze(2).transpose(1, 2)


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    return graph(checkpoint, attention, shape)


def graph(
    checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape, further: Sequence[Condition] = ()
) -> Graph:
    """The UNet with the inputs that its configuration asks for, and those ``further`` ones."""
    network = torch_networks.build(checkpoint, "unet")
    if attention is not None:
        put_attention(network, attention)
    config = checkpoint.models["unet"].config
    trio = interface(checkpoint, shape, config)
    conditions = taken((*CONDITIONS, *further), Asked(checkpoint, config, trio[0].shape))
    sample = trio[0].shape
    folded = checkpoint.folded.prediction_type is not None
    epsilon = Epsilon(folding.alphas_cumprod(checkpoint)) if folded else None
    return Graph(
        module=UNet(network, attention is not None, conditions, epsilon),
        inputs=(*trio, *(port for one in conditions for port in one.ports)),
        outputs=(
            Port("noise_pred", (sample[0], int(config["out_channels"]), *sample[2:]), "float32", "The prediction"),
        ),
        sample=lambda seed: draw_inputs(checkpoint, trio, conditions, seed),
        description="Predicts, from noised latents and encoded prompts, what the scheduler takes away in one step.",
        exact=(*exact_in("unet", network), *(["epsilon"] if folded else [])),
    )


def exact_in(name: str, network: nn.Module) -> tuple[str, ...]:
    """The modules of ``network``, which is the attribute ``name`` of the traced one, that stay in float32."""
    return tuple(f"{name}.{inner}" for inner in EXACT if hasattr(network, inner))


def interface(checkpoint: Checkpoint, shape: Shape, config: Mapping[str, Any]) -> tuple[Port, Port, Port]:
    """What a UNet and a ControlNet take in any case: latents, timestep, states. Row 0 is of the unconditional half
    where the batch has two. ``config``: the network's."""
    factor = latent_factor(checkpoint.models["vae"].config)
    batch, width = shape.batch_size, int(config["cross_attention_dim"])
    tokens = shape.context_length or text_length(checkpoint)
    size = (batch, int(config["in_channels"]), shape.height // factor, shape.width // factor)
    return (
        Port("sample", size, description="Noised latents, and after them the channels of a picture to work from"),
        Port("timestep", (batch,), description="The timestep of each row"),
        Port(
            "encoder_hidden_states", (batch, width, 1, tokens), description="The text encoder's states, transposed"
        ),
    )


def draw_inputs(
    checkpoint: Checkpoint,
    trio: tuple[Port, Port, Port],
    conditions: Sequence[Taken],
    seed: int,
) -> dict[str, np.ndarray]:
    """Latents of unit variance, each row with a timestep and a prompt of its own."""
    rng = np.random.default_rng(seed)
    sample, batch = trio[0].shape, trio[0].shape[0]
    latents = rng.standard_normal(sample)
    latent_channels = int(checkpoint.models["vae"].config["latent_channels"])
    if sample[1] == latent_channels + 1 + latent_channels:
        latents[:, latent_channels] = rng.random(sample[2:]) < 0.5  # the mask
    elif sample[1] == 2 * latent_channels:  # a picture's latents, not scaled; none in the last row of three
        latents[:, latent_channels:] /= latent_scale(checkpoint.models["vae"].config)
        latents[2::3, latent_channels:] = 0
    elif sample[1] != latent_channels:
        latents[:, latent_channels:] = np.clip(latents[:, latent_channels:], -1, 1)  # a depth, a small picture
    # Rows differ in their timesteps, or a model that takes the first row's for all would pass.
    steps = [TIMESTEPS[(seed * batch + row) % len(TIMESTEPS)] for row in range(batch)]
    ports = {port.name: port for port in (*trio, *(port for one in conditions for port in one.ports))}
    embeds = ports["text_embeds"].shape[1] if "text_embeds" in ports else 1
    states, pooled = _encode(checkpoint, trio[2].shape, embeds, seed)
    arrays = {"sample": latents, "timestep": np.array(steps), "encoder_hidden_states": states}
    arrays |= draw(conditions, Drawing(rng, pooled))
    return {name: arrays[name].astype(port.dtype) for name, port in ports.items()}


def _encode(
    checkpoint: Checkpoint, shape: tuple[int, ...], pooled_width: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(batch, width, 1, tokens) states of made-up prompts from the checkpoint's own text encoders, where it has
    those that fit: the first states are a hundred times larger than the rest. The pooled states of the last one."""
    batch, width, _, tokens = shape
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in checkpoint.models]
    widths = {name: int(checkpoint.models[name].config["hidden_size"]) for name in encoders}
    configs = [checkpoint.models[name].config for name in encoders]
    rng = np.random.default_rng(seed)
    if sum(widths.values()) != width:
        return rng.standard_normal((batch, width, 1, tokens)), rng.standard_normal((batch, pooled_width))
    states, pooled = [], np.zeros((batch, 0))
    for name, config in zip(encoders, configs, strict=True):
        encoder, length = reference(checkpoint, name), text_length(checkpoint, name)
        pieces = batch * tokens // length
        with widened(encoder), torch.inference_mode():
            rows = [
                encoder(torch.from_numpy(prompt_ids(config, seed * pieces + piece, length)))
                for piece in range(pieces)
            ]
        states.append(np.concatenate([row[0].numpy() for row in rows]).reshape(batch, tokens, -1))
        pooled = np.concatenate([row[1].numpy() for row in rows[:: pieces // batch]])
    return np.concatenate(states, axis=2).transpose(0, 2, 1)[:, :, None], pooled


UNET = Component(
    name="unet",
    build=build,
    min_psnr_db=60.0,
    uses_attention=True,
    runs=2,
    palettized=True,
)
