"""The UNet with inputs for what ControlNets add to it: one for any number of them, which are added up before."""

from __future__ import annotations

from dataclasses import replace

from diffusion_convert.checkpoint.controlnet import controlnets
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components import unet
from diffusion_convert.components.component import Graph, Shape
from diffusion_convert.components.conditions import RESIDUALS
from diffusion_runtime.families import AttentionKind


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    return unet.graph(checkpoint, attention, shape, [RESIDUALS])


CONTROL_UNET = replace(
    unet.UNET, name="control_unet", build=build, is_in=lambda checkpoint: bool(controlnets(checkpoint.models))
)
