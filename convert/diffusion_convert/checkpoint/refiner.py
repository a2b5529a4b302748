"""SDXL's refiner beside its base: one checkpoint of two UNets that share a text encoder and the VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_runtime.errors import InputError

SUBFOLDER = "refiner"
FAMILY = "sdxl-refiner"
SHARED = ("text_encoder_2", "vae")
"""What both UNets use: the base's."""


def with_refiner(checkpoint: Checkpoint, source: str, refiner: Checkpoint) -> Checkpoint:
    """The checkpoint with the UNet of ``refiner``, opened from ``source``, in addition.

    Raises InputError where the base is no Stable Diffusion XL, the other no refiner of it, or where it attends to
    another text encoder's states or makes other latents."""
    if checkpoint.family != "sdxl":
        raise InputError(f"--refiner {source}: {checkpoint.name} is of family {checkpoint.family}: expected sdxl")
    if refiner.family != FAMILY:
        raise InputError(f"--refiner {source}: is of family {refiner.family}: expected {FAMILY}")
    for part, keys in (("text_encoder_2", ("hidden_size", "projection_dim")), ("vae", ("latent_channels",))):
        own, other = (one.models[part].config for one in (checkpoint, refiner))
        for key in keys:
            if own[key] != other[key]:
                raise InputError(
                    f"--refiner {source}: is made for a {part} with {key} {other[key]}, but that of "
                    f"{checkpoint.name} has {own[key]}"
                )
    return replace(
        checkpoint,
        models={**checkpoint.models, SUBFOLDER: refiner.models["unet"]},
        refiner=refiner,
        notes=(*checkpoint.notes, *refiner.notes, *_differing(checkpoint, refiner)),
    )


def as_refiner(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of both as the refiner alone, with what it shares. Raises InputError where it has none."""
    if checkpoint.refiner is None:
        raise InputError(f"{checkpoint.name}: has no refiner: name it with --refiner")
    shared = {name: checkpoint.models[name] for name in SHARED}
    return replace(
        checkpoint.refiner,
        models={**shared, "unet": checkpoint.models[SUBFOLDER]},
        tokenizers={"text_encoder_2": checkpoint.tokenizers["text_encoder_2"]},
    )


def _differing(checkpoint: Checkpoint, refiner: Checkpoint) -> tuple[str, ...]:
    """A note on shared networks of which the refiner has another: told by their small tensors, of which every
    training changes some."""
    found = []
    for part in SHARED:
        own, other = (_vectors(one.models[part].tensors) for one in (checkpoint, refiner))
        same = own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
        if not same:
            found.append(f"the refiner has another {part} than {checkpoint.name}, whose own is used for both")
    return tuple(found)


def _vectors(tensors: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in tensors().items() if value.ndim == 1}
