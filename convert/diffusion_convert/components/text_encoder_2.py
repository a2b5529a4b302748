"""SDXL's second text encoder, OpenCLIP's ViT-bigG; the refiner's only one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from diffusion_convert.components.text_encoder import TEXT_ENCODER, build

TEXT_ENCODER_2 = replace(
    TEXT_ENCODER,
    name="text_encoder_2",
    build=partial(build, subfolder="text_encoder_2"),
)
