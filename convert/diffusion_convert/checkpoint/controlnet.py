"""ControlNets beside a checkpoint: networks of their own, each under the name by which users and apps choose it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_convert.checkpoint import (
    controlnet_file,
    diffusers_folder,
    repository,
    torch_networks,
)
from diffusion_convert.checkpoint.controlnet_file import CLASS_NAME, KIND, TASKS, UNION
from diffusion_convert.checkpoint.family import latent_factor, refuse_other_kinds
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_runtime.bundle.manifest import ControlNet, Source
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import COMPONENTS, compiled_names, several

PREFIX = COMPONENTS[KIND].several or ""
CHANNELS = 3
"""Of the picture that steers: what every client hands over."""
_FOREIGN = re.compile(r"[^A-Za-z0-9._-]+")
"""What is no part of a name: names are those of files, and come before "=" on the command line."""
_SHAPES: Mapping[str, Any] = {"block_out_channels": None, "layers_per_block": 2, "cross_attention_dim": None}
"""What must be as in the UNet, for the residuals and states to fit, with diffusers' defaults."""
_ADDED: Mapping[str, Any] = {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}

UNION_TYPES = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "inpaint")
"""What the published unions (xinsir's; the last two of "promax" alone) call their kinds of pictures, by number."""


@dataclass(frozen=True, slots=True)
class Opened:
    """One ControlNet: its name, its network, where it is from; of a union, the number of the kind of pictures.
    ``notes`` are sentences for the user."""

    name: str
    network: Submodel
    source: Source
    control_type: int | None = None
    notes: tuple[str, ...] = ()


def controlnets(networks: Iterable[str]) -> dict[str, str]:
    """The ControlNets among the names of a checkpoint's networks, by their own names."""
    return several(KIND, networks)


def with_controlnets(checkpoint: Checkpoint, sources: Sequence[str]) -> Checkpoint:
    """The checkpoint with the ControlNets of ``sources`` in addition: folders, files, or what is on the Hub; of a
    union with the kind of pictures after a colon (`UNION_TYPES`). No weight is read.

    Raises InputError for one that does not fit the checkpoint's UNet and for two of one name, CheckpointError for
    what is damaged or no ControlNet; both name the source.
    """
    _check_steerable(checkpoint, sources)
    opened = [_open(source, checkpoint.models["unet"].config) for source in sources]
    check_names("--controlnet", PREFIX, sources, [one.name for one in opened])
    for source, one in zip(sources, opened, strict=True):
        _check_fits(source, one.network.config, checkpoint)
        torch_networks.check(one.network, one.network.tensors(), f"{source}: {KIND}")
    return replace(
        checkpoint,
        models={**checkpoint.models, **{PREFIX + one.name: one.network for one in opened}},
        controlnets={one.name: _described(one) for one in opened},
        notes=(*checkpoint.notes, *(note for one in opened for note in one.notes)),
    )


def _described(one: Opened) -> ControlNet:
    pools = bool(one.network.config.get("global_pool_conditions", False))
    return ControlNet(source=one.source, global_pool_conditions=pools, control_type=one.control_type)


def _open(source: str, unet: Mapping[str, Any]) -> Opened:
    place, kind = _apart(source)
    notes = tuple[str, ...]()
    if (file := repository.network_file(place)) is not None:
        path, name, origin = file
        network = controlnet_file.read(path, unet)
        if controlnet_file.is_guess(path, network.config):
            notes = (f"{path.name} is taken for a ControlNet that gives means over the picture, by its name",)
    else:
        folder, origin = repository.network_folder(place, KIND)
        network, name = _from_folder(folder), origin.name
    control_type = _control_type(source, kind, network)
    return Opened(name_of(f"{name}-{kind}" if kind else name), network, origin, control_type, notes)


def _apart(source: str) -> tuple[str, str]:
    """``PATH:canny`` -> ``("PATH", "canny")``; a path with a colon in it is taken as it is where it exists."""
    place, _, kind = source.rpartition(":")
    known = place and (kind.isdecimal() or kind in UNION_TYPES) and not Path(source).expanduser().exists()
    return (place, kind) if known else (source, "")


def _control_type(source: str, kind: str, network: Submodel) -> int | None:
    """The number of a union's kind of pictures. Raises InputError where no kind is named, or one that it lacks."""
    if network.class_name != UNION:
        if kind:
            raise InputError(f"--controlnet {source}: takes one kind of pictures: leave out :{kind}")
        return None
    count = int(network.config.get("num_control_type", 6))
    names = [UNION_TYPES[number] if number < len(UNION_TYPES) else str(number) for number in range(count)]
    number = names.index(kind) if kind in names else int(kind) if kind.isdecimal() else count
    if number >= count:
        told = ", ".join(f"{name} ({number})" for number, name in enumerate(names))
        raise InputError(
            f"--controlnet {source}: is a union for several kinds of pictures: choose one, as in "
            f"{_apart(source)[0]}:{names[-1]}; there are {told}"
        )
    return number


def _from_folder(folder: Path) -> Submodel:
    network = diffusers_folder.read_network(folder, "ControlNet", CLASS_NAME, UNION)
    # Some unions are published as of the other class; diffusers asks its user for the right one.
    return diffusers_folder.read_submodel(folder, UNION) if TASKS in network.tensors() else network


def name_of(text: str) -> str:
    """``lllyasviel/sd-controlnet-canny`` -> ``lllyasviel_sd-controlnet-canny``, as Apple's converter does."""
    return _FOREIGN.sub("-", text.replace("/", "_")).strip("-.") or KIND


def check_names(option: str, prefix: str, sources: Sequence[str], names: Sequence[str]) -> None:
    """Raises InputError for two that apps could not tell apart. Disks of Macs take upper and lower case for one."""
    seen: dict[str, str] = {}
    for source, name in zip(sources, names, strict=True):
        (compiled,) = compiled_names(prefix + name)
        if (other := seen.get(compiled.casefold())) is not None:
            raise InputError(
                f"{option} {source}: is given twice"
                if other == source
                else f"{option} {source}: is called {name!r}, and {other} would have the same file name, "
                f"{compiled}.mlmodelc: rename one of their folders or files"
            )
        seen[compiled.casefold()] = source


def _check_steerable(checkpoint: Checkpoint, sources: Sequence[str]) -> None:
    """Raises InputError for a UNet that no ControlNet of diffusers is used with."""
    latents = int(checkpoint.models["vae"].config["latent_channels"])
    channels = int(checkpoint.models["unet"].config["in_channels"])
    if channels not in (latents, 2 * latents + 1):
        raise InputError(
            f"--controlnet {sources[0]}: {checkpoint.name} is of family {checkpoint.family}, whose UNet takes "
            f"{channels} channels: ControlNets are for those that take latents alone, or with a mask to paint in"
        )


def _check_fits(source: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises InputError for a ControlNet that was made for another UNet, with all that differs."""
    refuse_other_kinds(config, source)
    unet, vae = checkpoint.models["unet"].config, checkpoint.models["vae"].config
    wrong = [*_differing(config, unet)]
    for key, expected in (("in_channels", int(vae["latent_channels"])), ("conditioning_channels", CHANNELS)):
        if (found := int(config.get(key, expected))) != expected:
            wrong.append(f"{key} {found}, expected {expected}")
    shrinks = 2 ** (len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)
    if shrinks != latent_factor(vae):
        wrong.append(f"makes pictures {shrinks} times smaller, expected {latent_factor(vae)}")
    if wrong:
        raise InputError(
            f"--controlnet {source}: is for another kind of model than {checkpoint.name} ({checkpoint.family}): "
            + "; ".join(wrong)
        )


def _differing(config: Mapping[str, Any], unet: Mapping[str, Any]) -> Iterator[str]:
    for key, default in {**_SHAPES, **_ADDED}.items():
        found, expected = (_plain(one.get(key, default), len(unet["block_out_channels"])) for one in (config, unet))
        if found != expected:
            yield f"{key} {found}, expected {expected}"


def _plain(value: Any, blocks: int) -> Any:
    """One number for all blocks where it is the same for each; lists and tuples alike."""
    values = list(value) if isinstance(value, list | tuple) else [value] * blocks
    return values[0] if all(one == values[0] for one in values) else values
