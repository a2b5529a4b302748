"""LoRAs, fused into a checkpoint's weights as they are read: W + weight * alpha / rank * up @ down.

Everything in a file must have its place in the checkpoint: a LoRA for another model gives no picture worth having.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from diffusion_convert.checkpoint import lora_file
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.torch_networks import listed
from diffusion_convert.options import Lora
from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Update:
    """What one LoRA adds to one weight."""

    layer: lora_file.Layer
    weight: float

    def delta(self, shape: Sequence[int]) -> torch.Tensor:
        """``weight * scale * up @ down`` in float32, in the weight's shape. With a Tucker core (LoCon's ``mid``),
        up and down act on its first two dimensions."""
        import torch

        up, down = self.layer.up.float().flatten(1), self.layer.down.float().flatten(1)
        if self.layer.mid is None:
            product = up @ down
        else:
            product = torch.einsum("op,pqhw,qi->oihw", up, self.layer.mid.float(), down)
        return (self.weight * self.layer.scale * product).reshape(*shape)

    def shape(self) -> tuple[int, ...]:
        """Of the weights that it is for, a linear layer's for a 1x1 convolution; empty if its parts do not fit."""
        down, up, mid = self.layer.down, self.layer.up, self.layer.mid
        rank = down.shape[0]
        if up.shape[1] != rank or math.prod(up.shape[2:]) != 1:
            return ()
        if mid is not None and (
            mid.ndim != 4 or tuple(mid.shape[:2]) != (rank, rank) or down.shape[2:].numel() != 1
        ):
            return ()
        return _without_point(up.shape[0], down.shape[1], *(down if mid is None else mid).shape[2:])


def fuse(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """The checkpoint with ``loras`` fused into its weights, each when it is read, in float32, rounded once to the
    weight's own type. Raises InputError for what is no plain LoRA or for another model, CheckpointError for a
    damaged file."""
    updates: dict[str, dict[str, list[Update]]] = {}
    for lora in loras:
        for subfolder, name, update in _matched(checkpoint, lora):
            updates.setdefault(subfolder, {}).setdefault(name, []).append(update)
    models = {
        subfolder: replace(model, tensors=partial(_fused, model.tensors, updates[subfolder]))
        if subfolder in updates
        else model
        for subfolder, model in checkpoint.models.items()
    }
    return replace(checkpoint, models=models)


class Fused(Mapping[str, "torch.Tensor"]):
    """Weights of which some have updates, computed at access: nothing is held but views of the files."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], updates: Mapping[str, Sequence[Update]]) -> None:
        self._tensors, self._updates = tensors, updates

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._tensors[name]
        if name not in self._updates:
            return weight
        fused = weight.float()
        for update in self._updates[name]:
            fused = fused + update.delta(weight.shape)
        return fused.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _fused(
    tensors: Callable[[], Mapping[str, torch.Tensor]], updates: Mapping[str, Sequence[Update]]
) -> Mapping[str, torch.Tensor]:
    return Fused(tensors(), updates)


def _matched(checkpoint: Checkpoint, lora: Lora) -> list[tuple[str, str, Update]]:
    """Subfolder, weight name and update for every layer of a LoRA, all of which must have their place."""
    file = lora_file.read(lora.path)
    if not math.isfinite(lora.weight):
        raise InputError(f"{file.path}: LoRA weight {lora.weight}: expected a number")
    places = {subfolder: _places(checkpoint, subfolder) for subfolder in {layer.subfolder for layer in file.layers}}
    matched, strangers = [], list(file.unknown)
    for layer in file.layers:
        place = places[layer.subfolder].get(layer.module.replace(".", "_"))
        if place is None:
            strangers += layer.names
            continue
        name, shape = place
        update = Update(layer, lora.weight)
        if update.shape() != _without_point(*shape):
            raise InputError(
                f"{file.path}: made for another model than this {checkpoint.family}: {layer.names[0]} belongs to a "
                f"weight of shape {update.shape()}, but {layer.subfolder}'s {name} has {tuple(shape)}"
            )
        matched.append((layer.subfolder, name, update))
    if strangers:
        raise InputError(
            f"{file.path}: {len(strangers)} of its {file.size} tensors match nothing in this {checkpoint.family} "
            f"checkpoint: {listed(strangers)}; expected a LoRA made for this kind of model"
        )
    return matched


def _places(checkpoint: Checkpoint, subfolder: str) -> dict[str, tuple[str, Sequence[int]]]:
    """Name and shape of every weight that a LoRA can change, by its module's name with underscores for dots, as
    kohya writes it and as diffusers' names become: no two modules of these networks differ in that alone."""
    if subfolder not in checkpoint.models:
        return {}
    return {
        name.removesuffix(".weight").removeprefix("text_model.").replace(".", "_"): (name, value.shape)
        for name, value in checkpoint.models[subfolder].tensors().items()
        if name.endswith(".weight") and value.ndim in (2, 4)
    }


def _without_point(*shape: int) -> tuple[int, ...]:
    """A shape without the kernel of a 1x1 convolution."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape
