"""The inputs that a UNet or a ControlNet takes beside latents, timestep and states, an entry for each kind.

To add one: a `Condition` here, in `CONDITIONS` where a configuration asks for it, or handed to `unet.graph` by the
component that is about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.t2i_adapter import feature_shapes
from diffusion_convert.checkpoint.torch_networks import FEATURES_OF, PICTURE_TOKENS
from diffusion_convert.components.component import Port
from diffusion_runtime.guidance import guidance_embedding

AESTHETIC_TIME_IDS = 5
"""How many time_ids a refiner takes: SDXL's six with an aesthetic score in place of the picture's size."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the ports of a condition follow from: a network's configuration and the shape of its latents, (batch,
    channels, height, width)."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    sample: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """What the values of a condition are drawn from. ``pooled``: (batch, width) of the text encoder."""

    rng: np.random.Generator
    pooled: np.ndarray


@dataclass(frozen=True, slots=True)
class Condition:
    """One kind of inputs.

    ``ports``: the inputs; none where the network takes none of the kind. ``arguments``: what diffusers' network is
    called with for their tensors, by name; mappings of several conditions are put together. ``draw``: seeded values
    in the range that is met in use, by name.
    """

    ports: Callable[[Asked], tuple[Port, ...]]
    arguments: Callable[[nn.Module, Tensors], Mapping[str, Any]]
    draw: Callable[[tuple[Port, ...], Drawing], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Taken:
    """A condition that a network takes, with its ports."""

    condition: Condition
    ports: tuple[Port, ...]


def taken(conditions: Iterable[Condition], asked: Asked) -> tuple[Taken, ...]:
    """Those of ``conditions`` that a network takes."""
    found = (Taken(condition, condition.ports(asked)) for condition in conditions)
    return tuple(one for one in found if one.ports)


def arguments(network: nn.Module, conditions: Sequence[Taken], tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What diffusers' ``network`` is called with for all conditions; ``tensors`` are theirs, in order."""
    left, found = list(tensors), dict[str, Any]()
    for one in conditions:
        given, left = left[: len(one.ports)], left[len(one.ports) :]
        named = {port.name: tensor for port, tensor in zip(one.ports, given, strict=True)}
        for name, value in one.condition.arguments(network, named).items():
            # added_cond_kwargs is one dictionary for conditions of several kinds.
            found[name] = {**found[name], **value} if isinstance(found.get(name), Mapping) else value
    return found


def draw(conditions: Sequence[Taken], drawing: Drawing) -> dict[str, np.ndarray]:
    """Values for the inputs of all conditions, by name."""
    return {name: array for one in conditions for name, array in one.condition.draw(one.ports, drawing).items()}


# --- class labels: of the upscaler, how much noise the picture was given


def _label_ports(asked: Asked) -> tuple[Port, ...]:
    if asked.config.get("num_class_embeds") is None and asked.config.get("class_embed_type") is None:
        return ()
    return (Port("class_labels", asked.sample[:1], description="How much noise the picture was given"),)


def _label_arguments(network: nn.Module, given: Tensors) -> Mapping[str, Any]:
    labels = given["class_labels"]
    embeds = isinstance(getattr(network, "class_embedding", None), nn.Embedding)
    return {"class_labels": labels.to(torch.int32) if embeds else labels}


# --- SDXL's sizes and pooled states


def _added_ports(asked: Asked) -> tuple[Port, ...]:
    config, batch = asked.config, asked.sample[0]
    if config.get("addition_embed_type") != "text_time":
        return ()
    embeds = int(asked.checkpoint.models["text_encoder_2"].config["projection_dim"])
    width = int(config["addition_time_embed_dim"])
    ids = (int(config["projection_class_embeddings_input_dim"]) - embeds) // width
    told = "original height and width, top and left of the crop, and " + (
        "the aesthetic score" if ids == AESTHETIC_TIME_IDS else "height and width of the picture"
    )
    return (
        Port("time_ids", (batch, ids), description=f"In pixels: {told}"),
        Port("text_embeds", (batch, embeds), description="The second text encoder's pooled_outputs"),
    )


def _draw_added(ports: tuple[Port, ...], drawing: Drawing) -> Mapping[str, np.ndarray]:
    """Sizes of several hundred pixels, crops of none or some, and where they belong, aesthetic scores."""
    rows, columns = ports[0].shape
    sizes = ((1024, 1024, 0, 0, 1024, 1024), (768, 1152, 0, 64, 896, 1088), (1216, 832, 32, 0, 1216, 832))
    ids = np.array(sizes, np.float64)
    found = ids[drawing.rng.permutation(max(rows, 2))][:rows, :columns]
    if columns == AESTHETIC_TIME_IDS:
        found[:, -1] = drawing.rng.uniform(2, 7, len(found))
    return {"time_ids": found, "text_embeds": drawing.pooled}


# --- the guidance scale as an input


def _guidance_ports(asked: Asked) -> tuple[Port, ...]:
    width = asked.config.get("time_cond_proj_dim")
    told = "The guidance scale, embedded as a latent consistency model was trained with it"
    return () if width is None else (Port("timestep_cond", (asked.sample[0], int(width)), description=told),)


def _draw_guidance(ports: tuple[Port, ...], drawing: Drawing) -> Mapping[str, np.ndarray]:
    batch, width = ports[0].shape
    scales = torch.from_numpy(drawing.rng.uniform(1, 14, batch))
    return {"timestep_cond": guidance_embedding(scales, width).numpy()}


# --- what ControlNets add to the skip connections and to the middle


def residual_shapes(config: Mapping[str, Any], sample: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the residuals of a UNet or ControlNet: after its first convolution, each layer on the way down
    and each downsampling; of the middle block last. ``sample``: of its latents."""
    batch, (height, width) = sample[0], sample[2:]
    channels = [int(count) for count in config["block_out_channels"]]
    layers = config.get("layers_per_block", 2)
    counts = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    shapes = [(batch, channels[0], height, width)]
    for number, (own, count) in enumerate(zip(channels, counts, strict=True)):
        shapes += [(batch, own, height, width)] * count
        if number + 1 < len(channels):  # the last block keeps the size
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((batch, own, height, width))
    return (*shapes, (batch, channels[-1], height, width))


RESIDUAL = "additional_residual_"


def _residual_ports(asked: Asked) -> tuple[Port, ...]:
    shapes = residual_shapes(asked.config, asked.sample)
    told = "What all ControlNets add here, each times its scale; zeros where there is none"
    return tuple(Port(f"{RESIDUAL}{number}", shape, description=told) for number, shape in enumerate(shapes))


def _residual_arguments(_: nn.Module, given: Tensors) -> Mapping[str, Any]:
    *down, middle = given.values()
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def _draw_residuals(ports: tuple[Port, ...], drawing: Drawing) -> Mapping[str, np.ndarray]:
    return {port.name: drawing.rng.standard_normal(port.shape) for port in ports}


# --- pictures that are prompts: the tokens of each IP-Adapter, and how much each counts


IMAGE_TOKENS, IP_ADAPTER_SCALE = "image_tokens_", "ip_adapter_scale"


def _picture_ports(asked: Asked) -> tuple[Port, ...]:
    tokens, width = asked.config.get(PICTURE_TOKENS, ()), int(asked.config["cross_attention_dim"])
    ports = [
        Port(f"{IMAGE_TOKENS}{index}", (asked.sample[0], width, 1, count), description="Of the image_projection")
        for index, count in enumerate(tokens)
    ]
    told = "How much each IP-Adapter counts; 0: not at all"
    return (*ports, Port(IP_ADAPTER_SCALE, (len(tokens),), description=told)) if tokens else ()


def _picture_arguments(network: nn.Module, given: Tensors) -> Mapping[str, Any]:
    """What the cross-attentions of this network take: ours are told the scales with the tokens, diffusers' have
    them as an attribute."""
    *tokens, scales = given.values()
    theirs = [one for one in getattr(network, "attn_processors", {}).values() if hasattr(one, "to_k_ip")]
    for processor in theirs:
        processor.scale = scales.tolist()
    ours = (tuple(tokens), torch.split(scales.reshape(-1, 1, 1, 1), 1))
    return {"added_cond_kwargs": {"image_embeds": [one.transpose(1, 3) for one in tokens] if theirs else ours}}


def _draw_pictures(ports: tuple[Port, ...], drawing: Drawing) -> Mapping[str, np.ndarray]:
    """Tokens, which come out of a norm, and scales."""
    *tokens, scales = ports
    drawn = {port.name: drawing.rng.standard_normal(port.shape) for port in tokens}
    return {**drawn, scales.name: drawing.rng.uniform(0.3, 1, scales.shape)}


# --- what T2I-Adapters add to the features on the way down: diffusers' down_intrablock_additional_residuals


FEATURE = "adapter_state_"


def _feature_ports(asked: Asked) -> tuple[Port, ...]:
    name = asked.config.get(FEATURES_OF)
    if name is None:
        return ()
    models, (batch, _, *size) = asked.checkpoint.models, asked.sample
    factor = latent_factor(models["vae"].config)
    shapes = feature_shapes(models[name], size[0] * factor, size[1] * factor)
    told = "What all T2I-Adapters add here, each times its scale; zeros where there is none"
    return tuple(
        Port(f"{FEATURE}{number}", (batch, *one[1:]), description=told) for number, one in enumerate(shapes)
    )


def _feature_arguments(_: nn.Module, given: Tensors) -> Mapping[str, Any]:
    return {"down_intrablock_additional_residuals": list(given.values())}


CONDITIONS: tuple[Condition, ...] = (
    Condition(
        _label_ports,
        _label_arguments,
        lambda ports, drawing: {"class_labels": drawing.rng.integers(0, 350, ports[0].shape)},
    ),
    Condition(_added_ports, lambda _, given: {"added_cond_kwargs": dict(given)}, _draw_added),
    Condition(_guidance_ports, lambda _, given: dict(given), _draw_guidance),
    Condition(_picture_ports, _picture_arguments, _draw_pictures),
    Condition(_feature_ports, _feature_arguments, _draw_residuals),
)
"""What a configuration asks for, in the order of the inputs."""
RESIDUALS = Condition(_residual_ports, _residual_arguments, _draw_residuals)
