"""SDXL's refiner: the UNet that does the last steps, beside its base's."""

from __future__ import annotations

from dataclasses import replace

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.refiner import as_refiner
from diffusion_convert.components import unet
from diffusion_convert.components.component import Graph, Shape
from diffusion_runtime.families import AttentionKind


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    return unet.build(as_refiner(checkpoint), attention, shape)


REFINER = replace(unet.UNET, name="refiner", build=build)
