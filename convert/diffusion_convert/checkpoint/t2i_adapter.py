"""T2I-Adapters (Mou et al. 2023): networks that make of a picture, once, what is added to the UNet's features.

All that are converted with a UNet give features of the same shapes, since they are for it: several are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusion_convert.checkpoint import (
    diffusers_folder,
    repository,
    t2i_adapter_file,
    torch_networks,
)
from diffusion_convert.checkpoint.controlnet import check_names, name_of
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.t2i_adapter_file import CLASS_NAME
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import COMPONENTS

KIND, IN_PIPELINE = "t2i_adapter", "adapter"
PREFIX = COMPONENTS[KIND].several or ""
OPTION = "--t2i-adapter"
LATENTS = 64
"""Height and width in latents at which adapters are compared with a UNet."""

Shape = tuple[int, ...]


def with_t2i_adapters(checkpoint: Checkpoint, sources: Sequence[str]) -> Checkpoint:
    """The checkpoint with the T2I-Adapters of ``sources``: diffusers' folders, single
    files, or what is on the Hub. No weight is read.

    Raises InputError for one that does not fit the checkpoint's UNet and for two of one name, CheckpointError for
    what is damaged or no T2I-Adapter."""
    opened = [_open(source) for source in sources]
    names = [name for name, *_ in opened]
    check_names(OPTION, PREFIX, sources, names)
    for source, (_, network, _) in zip(sources, opened, strict=True):
        _check_fits(source, network, checkpoint)
        torch_networks.check(network, network.tensors(), f"{source}: {KIND}")
    unet = checkpoint.models["unet"]
    steered = replace(unet, config={**unet.config, torch_networks.FEATURES_OF: PREFIX + names[0]})
    networks = {PREFIX + name: network for name, network, _ in opened}
    return replace(
        checkpoint,
        models={**checkpoint.models, "unet": steered, **networks},
        t2i_adapters={name: source for name, _, source in opened},
    )


def _open(source: str) -> tuple[str, Submodel, Source]:
    if (file := repository.network_file(source)) is not None:
        path, name, origin = file
        return name_of(name), t2i_adapter_file.read(path), origin
    folder, origin = repository.network_folder(source, IN_PIPELINE)
    return name_of(origin.name), diffusers_folder.read_network(folder, "T2I-Adapter", CLASS_NAME), origin


def feature_shapes(adapter: Submodel, height: int, width: int, where: str = KIND) -> tuple[Shape, ...]:
    """The shapes of what an adapter gives for a picture of so many pixels, which must be a multiple of what it
    shrinks pictures by."""
    network = torch_networks.empty(adapter, where)
    channels = int(adapter.config.get("in_channels", 3))
    return tuple(tuple(one.shape) for one in network(torch.empty(1, channels, height, width, device="meta")))


def _places(config: Mapping[str, Any], height: int, width: int) -> Iterator[Shape]:
    """Where diffusers' UNet adds features, by the shape of what they are added to: in a block with attention before
    it makes the picture smaller, in any other after that, and last in the middle."""
    kinds, channels = config["down_block_types"], [int(one) for one in config["block_out_channels"]]
    for number, (kind, own) in enumerate(zip(kinds, channels, strict=True), 1):
        if "CrossAttn" in kind:
            yield 1, own, height, width
        if number < len(kinds):
            height, width = (height + 1) // 2, (width + 1) // 2
        if "CrossAttn" not in kind:
            yield 1, own, height, width
    yield 1, channels[-1], height, width


def _check_fits(source: str, network: Submodel, checkpoint: Checkpoint) -> None:
    factor = latent_factor(checkpoint.models["vae"].config)
    given = feature_shapes(network, LATENTS * factor, LATENTS * factor, f"{source}: {KIND}")
    wanted = tuple(_places(checkpoint.models["unet"].config, LATENTS, LATENTS))
    if given != wanted[: len(given)]:
        raise InputError(
            f"{OPTION} {source}: is for another UNet than that of {checkpoint.name} ({checkpoint.family}): for "
            f"{LATENTS}x{LATENTS} latents it gives features of {_listed(given)}, expected {_listed(wanted)}"
        )


def _listed(shapes: Sequence[Shape]) -> str:
    return ", ".join("x".join(map(str, shape[1:])) for shape in shapes)


def check_size(checkpoint: Checkpoint, height: int, width: int) -> None:
    """Raises InputError for a size of pictures, in pixels, that an adapter cannot take."""
    for name in checkpoint.t2i_adapters:
        config = checkpoint.models[PREFIX + name].config
        step = int(config.get("downscale_factor", 8))
        if height % step or width % step:
            raise InputError(f"--height {height} --width {width}: the T2I-Adapter {name} takes multiples of {step}")
