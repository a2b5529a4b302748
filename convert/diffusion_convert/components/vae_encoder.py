"""The VAE's encoder: a picture to the mean and log-variance of its latents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import folding, torch_networks
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.vae import gives_latents
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.components.vae_decoder import picture_dtype, wide_parts
from diffusion_convert.networks import put_attention
from diffusion_convert.networks.folding import Affine
from diffusion_runtime.families import AttentionKind

EXACT = -14.0
"""A standard deviation of 0.0009, too little to be seen. A smaller one would be a larger number here, in the output
that is compared with the checkpoint's: that would hide an error of the latents."""


class Encoder(nn.Module):
    """x (1, 3, height, width) in -1..1 -> latent (1, 2 · channels, …): mean, then log-variance, unscaled.

    ``known``: from the VAE's own latents to those that apps multiply. An encoder that gives latents, as TAESD's,
    and not a distribution, is given `EXACT` for a log-variance: nothing to see is added where apps draw from it."""

    def __init__(self, vae: Any, known: Affine | None = None) -> None:
        super().__init__()
        self.known = known
        self.encoder = vae.encoder
        self.quant_conv = getattr(vae, "quant_conv", None)
        self.is_exact = gives_latents(type(vae).__name__)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.encoder(x)
        if self.is_exact:
            latent = nn.functional.pad(latent, (0, 0, 0, 0, 0, int(latent.shape[1])), value=EXACT)
        latent = latent if self.quant_conv is None else self.quant_conv(latent)
        return latent if self.known is None else self.known(latent)


def known_latents(checkpoint: Checkpoint) -> Affine | None:
    """The inverse of `vae_decoder.own_latents` for the mean, and its gain for the variance."""
    own, channels = checkpoint.folded.latents, int(checkpoint.models["vae"].config["latent_channels"])
    if own is None:
        return None
    scale, shift = folding.latents(checkpoint)
    gains = [own.scale / scale / std for std in own.std or [1.0] * channels]
    means = [own.shift + mean for mean in own.mean or [0.0] * channels]
    return Affine(
        [*gains, *[1.0] * channels],
        [
            *(shift - mean * gain for mean, gain in zip(means, gains, strict=True)),
            *(2 * math.log(gain) for gain in gains),
        ],
    )


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    vae = torch_networks.build(checkpoint, "vae")
    if attention is not None:
        put_attention(vae, attention)
    config = checkpoint.models["vae"].config
    factor, channels = latent_factor(config), int(config["latent_channels"])
    size = (1, int(config.get("in_channels", 3)), shape.height, shape.width)
    dtype = picture_dtype(checkpoint)
    return Graph(
        module=Encoder(vae, known_latents(checkpoint)),
        inputs=(Port("x", size, dtype, "A picture in -1..1"),),
        outputs=(
            Port(
                "latent",
                (1, 2 * channels, shape.height // factor, shape.width // factor),
                "float32",
                "The mean and the log-variance of the latents, not scaled",
            ),
        ),
        sample=lambda seed: {"x": plain_patches(size, factor, seed).astype(np.float16).astype(dtype)},
        description="Encodes a picture into the mean and log-variance of its latents.",
        exact=wide_parts(checkpoint, "vae", "encoder", "quant_conv"),
    )


def plain_patches(size: tuple[int, ...], side: int, seed: int) -> np.ndarray:
    """A picture of plain patches of so many pixels, with some noise, in -1..1."""
    rng = np.random.default_rng(seed)
    patches = rng.uniform(-1, 1, (*size[:2], size[2] // side, size[3] // side))
    smooth = patches.repeat(side, axis=2).repeat(side, axis=3)
    return np.clip(smooth + 0.1 * rng.standard_normal(size), -1, 1)


VAE_ENCODER = Component(
    name="vae_encoder",
    build=build,
    min_psnr_db=60.0,
)
