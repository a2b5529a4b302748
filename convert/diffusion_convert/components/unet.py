"""The UNet: one denoising step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import folding, torch_networks
from diffusion_convert.checkpoint.family import latent_factor, text_length
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.components.text_encoder import prompt_ids, reference
from diffusion_convert.networks import put_attention
from diffusion_convert.networks.folding import Epsilon
from diffusion_convert.verification.compare import widened
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.guidance import guidance_embedding

TIMESTEPS = (999, 1, 801, 201, 601, 401)
"""Where verification looks, in this order: the ends first, where values are largest."""
EXACT = ("time_proj", "add_time_proj")
"""Sines of timesteps and of sizes in pixels: float16 has no room for their phase."""
AESTHETIC_TIME_IDS = 5
"""How many time_ids a refiner takes: SDXL's six with an aesthetic score in place of the picture's size."""


class UNet(nn.Module):
    """diffusers' UNet with the interface of the Core ML model: states are (batch, width, 1, tokens).

    ``channels_first``: the transformers inside take them so, too. ``conditions`` names, in order, the inputs that
    follow the states (`interface`). ``epsilon`` makes noise of what the network predicts.
    """

    def __init__(
        self, network: Any, channels_first: bool, conditions: Sequence[str], epsilon: Epsilon | None = None
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.unet = network
        self.channels_first = channels_first
        self.conditions = tuple(conditions)
        self.embeds_labels = isinstance(getattr(network, "class_embedding", None), nn.Embedding)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *conditions: torch.Tensor,
    ) -> torch.Tensor:
        given = dict(zip(self.conditions, conditions, strict=True))
        states = encoder_hidden_states
        if not self.channels_first:
            states = states.squeeze(2).transpose(1, 2)
        labels = given.get("class_labels")
        if labels is not None and self.embeds_labels:
            labels = labels.to(torch.int32)
        added = {name: given[name] for name in ("time_ids", "text_embeds") if name in given}
        noise: torch.Tensor = self.unet(
            sample,
            timestep,
            states,
            class_labels=labels,
            timestep_cond=given.get("timestep_cond"),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return noise if self.epsilon is None else self.epsilon(noise, sample, timestep)


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    network = torch_networks.build(checkpoint, "unet")
    if attention is not None:
        put_attention(network, attention)
    config = checkpoint.models["unet"].config
    inputs = interface(checkpoint, shape)
    sample = inputs[0].shape
    folded = checkpoint.folded.prediction_type is not None
    epsilon = Epsilon(folding.alphas_cumprod(checkpoint)) if folded else None
    return Graph(
        module=UNet(network, attention is not None, [port.name for port in inputs[3:]], epsilon),
        inputs=inputs,
        outputs=(
            Port("noise_pred", (sample[0], int(config["out_channels"]), *sample[2:]), "float32", "The prediction"),
        ),
        sample=lambda seed: _draw(checkpoint, config, inputs, seed),
        description="Predicts, from noised latents and encoded prompts, what the scheduler takes away in one step.",
        exact=(*(f"unet.{name}" for name in EXACT if hasattr(network, name)), *(["epsilon"] if folded else [])),
    )


def interface(checkpoint: Checkpoint, shape: Shape) -> tuple[Port, ...]:
    """The UNet's inputs: latents, timestep, states, then its conditions. Row 0 is of the unconditional half where
    the batch has two."""
    config = checkpoint.models["unet"].config
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
        *_conditions(checkpoint, config, batch),
    )


def _conditions(checkpoint: Checkpoint, config: Mapping[str, Any], batch: int) -> Iterator[Port]:
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        yield Port("class_labels", (batch,), description="How much noise the picture was given")
    if config.get("addition_embed_type") == "text_time":
        embeds = int(checkpoint.models["text_encoder_2"].config["projection_dim"])
        ids = (int(config["projection_class_embeddings_input_dim"]) - embeds) // int(
            config["addition_time_embed_dim"]
        )
        told = "original height and width, top and left of the crop, and " + (
            "the aesthetic score" if ids == AESTHETIC_TIME_IDS else "height and width of the picture"
        )
        yield Port("time_ids", (batch, ids), description=f"In pixels: {told}")
        yield Port("text_embeds", (batch, embeds), description="The second text encoder's pooled_outputs")
    if config.get("time_cond_proj_dim") is not None:
        yield Port(
            "timestep_cond",
            (batch, int(config["time_cond_proj_dim"])),
            description="The guidance scale, embedded as a latent consistency model was trained with it",
        )


def _draw(
    checkpoint: Checkpoint, config: Mapping[str, Any], inputs: tuple[Port, ...], seed: int
) -> Mapping[str, np.ndarray]:
    """Latents of unit variance, each row with a timestep and a prompt of its own."""
    rng = np.random.default_rng(seed)
    shapes = {port.name: port.shape for port in inputs}
    sample, batch = inputs[0].shape, inputs[0].shape[0]
    latents = rng.standard_normal(sample)
    latent_channels = int(config["out_channels"])
    if sample[1] == latent_channels + 1 + latent_channels:
        latents[:, latent_channels] = rng.random(sample[2:]) < 0.5  # the mask
    elif sample[1] != latent_channels:
        latents[:, latent_channels:] = np.clip(latents[:, latent_channels:], -1, 1)  # a depth, a small picture
    steps = [TIMESTEPS[(seed * batch + row) % len(TIMESTEPS)] for row in range(batch)]
    states, pooled = _encode(checkpoint, shapes, seed)
    arrays = {
        "sample": latents,
        "timestep": np.array(steps),
        "encoder_hidden_states": states,
        "class_labels": rng.integers(0, 350, batch),
        "text_embeds": pooled,
    }
    if "time_ids" in shapes:
        arrays["time_ids"] = _time_ids(shapes["time_ids"], rng)
    if "timestep_cond" in shapes:
        scales = torch.from_numpy(rng.uniform(1, 14, batch))
        arrays["timestep_cond"] = guidance_embedding(scales, shapes["timestep_cond"][1]).numpy()
    return {port.name: arrays[port.name].astype(port.dtype) for port in inputs}


def _time_ids(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Sizes of several hundred pixels, crops of none or some, and where they belong, aesthetic scores."""
    ids = np.array([[1024, 1024, 0, 0, 1024, 1024], [768, 1152, 0, 64, 896, 1088]], np.float64)
    rows = ids[rng.permutation(2)][: shape[0], : shape[1]]
    if shape[1] == AESTHETIC_TIME_IDS:
        rows[:, -1] = rng.uniform(2, 7, len(rows))
    return rows


def _encode(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(batch, width, 1, tokens) states of made-up prompts from the checkpoint's own text encoders, where it has
    those that fit: the first states are a hundred times larger than the rest. The pooled states of the last one."""
    batch, width, _, tokens = shapes["encoder_hidden_states"]
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in checkpoint.models]
    widths = {name: int(checkpoint.models[name].config["hidden_size"]) for name in encoders}
    configs = [checkpoint.models[name].config for name in encoders]
    rng = np.random.default_rng(seed)
    if sum(widths.values()) != width:
        pooled_width = shapes.get("text_embeds", (batch, 1))[1]
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
