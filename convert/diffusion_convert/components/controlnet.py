"""A ControlNet: what it adds to the UNet in one step, for a picture that steers it.

The conditioning scale is not part of it: clients multiply what it gives, as they add up what several give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components import unet
from diffusion_convert.components.component import Build, Component, Graph, Port, Shape
from diffusion_convert.components.conditions import (
    CONDITIONS,
    RESIDUAL,
    Asked,
    Taken,
    arguments,
    residual_shapes,
    taken,
)
from diffusion_convert.networks import put_attention
from diffusion_convert.networks.control_union import in_float32, put_sequence_attention
from diffusion_runtime.families import AttentionKind, own_name

PICTURE = "controlnet_cond"


class ControlNet(nn.Module):
    """diffusers' ControlNetModel with the interface of the Core ML model: states are (batch, width, 1, tokens), the
    picture comes last. ``shapes`` are those of the residuals: one that is the mean over a picture is given as large
    as what the UNet adds it to."""

    def __init__(
        self,
        network: Any,
        channels_first: bool,
        conditions: Sequence[Taken],
        shapes: Sequence[Sequence[int]],
        control_type: int | None = None,
    ) -> None:
        super().__init__()
        self.controlnet = network
        self.channels_first = channels_first
        self.conditions = tuple(conditions)
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.control_type = control_type
        if control_type is not None:
            kinds = torch.eye(network.config.num_control_type)[control_type].repeat(shapes[0][0], 1)
            self.register_buffer("control_types", kinds, persistent=False)
        # diffusers flips the channels, which Core ML has an operation for that the Neural Engine lacks.
        self.reverses = channels_first and network.config.controlnet_conditioning_channel_order == "bgr"
        if self.reverses:
            network.register_to_config(controlnet_conditioning_channel_order="rgb")

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *others: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        *conditions, picture = others
        if self.reverses:
            picture = torch.cat(torch.split(picture, 1, dim=1)[::-1], dim=1)
        down, middle = self.controlnet(
            sample,
            timestep,
            unet.as_network_takes(encoder_hidden_states, self.channels_first),
            **self._picture(picture),
            **arguments(self.controlnet, self.conditions, conditions),
            return_dict=False,
        )
        pairs = zip((*down, middle), self.shapes, strict=True)
        return tuple(one if tuple(one.shape) == shape else one.expand(shape) for one, shape in pairs)

    def _picture(self, picture: torch.Tensor) -> dict[str, Any]:
        """The picture as diffusers' network takes it: a union's with a 1 for its kind."""
        if self.control_type is None:
            return {"controlnet_cond": picture}
        return {
            "controlnet_cond": [picture],
            "control_type": self.control_types,
            "control_type_idx": [self.control_type],
        }


def build_of(name: str) -> Build:
    """The build of the ControlNet that is called so in the checkpoint."""

    def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
        network = torch_networks.build(checkpoint, name)
        if attention is not None:
            put_attention(network, attention)
            put_sequence_attention(network)
        else:
            in_float32(network)
        config, told = checkpoint.models[name].config, checkpoint.controlnets[own_name(name)]
        trio = unet.interface(checkpoint, shape, config)
        conditions = taken(CONDITIONS, Asked(checkpoint, config, trio[0].shape))
        factor = latent_factor(checkpoint.models["vae"].config)
        shapes = residual_shapes(config, trio[0].shape)
        picture = Port(
            PICTURE,
            (
                shape.batch_size,
                int(config.get("conditioning_channels", 3)),
                *(factor * n for n in trio[0].shape[2:]),
            ),
            description="The picture that steers, from 0 to 1",
        )
        return Graph(
            module=ControlNet(network, attention is not None, conditions, shapes, told.control_type),
            inputs=(*trio, *(port for one in conditions for port in one.ports), picture),
            # Apple's Swift client adds up those of several ControlNets through pointers to Float32.
            outputs=tuple(
                Port(f"{RESIDUAL}{number}", one, "float32", "What is added to the UNet")
                for number, one in enumerate(shapes)
            ),
            sample=lambda seed: _draw(checkpoint, trio, conditions, picture, seed),
            description="Gives, for a picture that steers, what is added to the UNet in one step.",
            exact=unet.exact_in("controlnet", network),
        )

    return build


def _draw(
    checkpoint: Checkpoint,
    trio: tuple[Port, Port, Port],
    conditions: Sequence[Taken],
    picture: Port,
    seed: int,
) -> dict[str, np.ndarray]:
    """A UNet's inputs, and a picture of noise, of edges and of plain areas."""
    drawn = unet.draw_inputs(checkpoint, trio, conditions, seed)
    noise = np.random.default_rng(seed).random(picture.shape)
    third = picture.shape[3] // 3
    noise[..., :third] = noise[..., :third] > 0.9
    noise[..., third : 2 * third] = noise[:, :, :1, :1]
    return {**drawn, picture.name: noise.astype(picture.dtype)}


CONTROLNET = Component(
    name="controlnet",
    build=build_of("controlnet"),
    build_of=build_of,
    min_psnr_db=60.0,
    uses_attention=True,
    runs=2,
    palettized=True,
)
