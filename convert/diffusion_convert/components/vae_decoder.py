"""The VAE's decoder: latents to a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import folding, torch_networks
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.networks import put_attention
from diffusion_convert.networks.folding import Affine
from diffusion_runtime.families import FAMILIES, AttentionKind


class Decoder(nn.Module):
    """z (1, channels, height, width), already divided by the scaling factor -> image (1, 3, …) in about -1..1.

    ``own``: from latents as apps divide them to the VAE's own."""

    def __init__(self, vae: Any, own: Affine | None = None) -> None:
        super().__init__()
        self.own = own
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.decoder = vae.decoder

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = z if self.own is None else self.own(z)
        image: torch.Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return image


def picture_dtype(checkpoint: Checkpoint) -> str:
    """The element type of the VAE's inputs: apps hand float32 to SDXL's, float16 to any other."""
    return "float32" if FAMILIES[checkpoint.family].added_conditions else "float16"


def wide_parts(checkpoint: Checkpoint, subfolder: str, *modules: str) -> tuple[str, ...]:
    """``modules`` of a VAE that says ``force_upcast``: all of it, as diffusers does, since pictures, unlike noise,
    overflow float16 in SDXL's. VAEs that were mended for float16 say false."""
    upcast = checkpoint.models[subfolder].config.get("force_upcast")
    return modules if upcast and picture_dtype(checkpoint) == "float32" else ()


def own_latents(checkpoint: Checkpoint, subfolder: str = "vae") -> Affine | None:
    """From latents as the manifest describes them, unscaled, to those of the VAE's own decoder; None where they are
    the same. A decoder for previews has latents of its own, whatever is folded."""
    own, channels = checkpoint.folded.latents, int(checkpoint.models["vae"].config["latent_channels"])
    if subfolder != "vae":
        own = folding.own_latents(checkpoint, subfolder)
    if own is None:
        return None
    scale, shift = folding.latents(checkpoint)
    gains = [scale / own.scale * std for std in own.std or [1.0] * channels]
    means = own.mean or [0.0] * channels
    return Affine(gains, [own.shift + mean - shift * gain for mean, gain in zip(means, gains, strict=True)])


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape, subfolder: str = "vae") -> Graph:
    vae = torch_networks.build(checkpoint, subfolder)
    if attention is not None:
        put_attention(vae, attention)
    config = checkpoint.models["vae"].config
    factor, (scale, shift) = latent_factor(config), folding.latents(checkpoint)
    size = (1, int(config["latent_channels"]), shape.height // factor, shape.width // factor)
    dtype = picture_dtype(checkpoint)

    def draw(seed: int) -> dict[str, np.ndarray]:
        latents = np.random.default_rng(seed).standard_normal(size) / scale
        return {"z": (latents + shift).astype(np.float16).astype(dtype)}

    return Graph(
        module=Decoder(vae, own_latents(checkpoint, subfolder)),
        inputs=(Port("z", size, dtype, "Latents, divided by the VAE's scaling factor"),),
        outputs=(Port("image", (1, 3, shape.height, shape.width), "float32", "A picture in -1..1"),),
        sample=draw,
        description="Decodes latents into a picture.",
        exact=wide_parts(checkpoint, subfolder, "decoder", "post_quant_conv"),
    )


VAE_DECODER = Component(
    name="vae_decoder",
    build=build,
    min_psnr_db=60.0,
)
