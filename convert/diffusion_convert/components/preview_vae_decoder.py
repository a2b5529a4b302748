"""A second, cheaper decoder, for looking at a picture while it is made: of the same latents as the VAE's own."""

from __future__ import annotations

from functools import partial

from diffusion_convert.components.component import Component
from diffusion_convert.components.vae_decoder import build

PREVIEW_VAE_DECODER = Component(
    name="preview_vae_decoder",
    build=partial(build, subfolder="preview_vae"),
    min_psnr_db=60.0,
)
