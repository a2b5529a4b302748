"""LoRAs, fused into a checkpoint's weights as they are read.

Everything in a file must have its place in the checkpoint: a LoRA for another model gives no picture worth having.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from diffusion_convert.checkpoint.computed import FLOAT16_MAX, Computed, least_float16
from diffusion_convert.checkpoint.ldm_mmdit import swap
from diffusion_convert.checkpoint.lora import file as lora_file
from diffusion_convert.checkpoint.lora.kinds import Layer
from diffusion_convert.checkpoint.lora.places import TEXT_LAYER, Place, places, text_layers
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.torch_networks import listed
from diffusion_convert.option_values import Lora
from diffusion_runtime.bundle.manifest import FusedLora
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import FAMILIES


@dataclass(frozen=True, slots=True)
class Update:
    """What one LoRA does to one tensor of a network, the "weight" or the "bias" (``target``) of the module at
    ``place``."""

    layer: Layer
    target: str
    strength: float
    place: Place

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` (float32) with the LoRA in it. Raises ValueError where it does not fit."""
        if self.place.swapped:
            return swap(self.layer.change(self.target, swap(value), self.strength))
        part, count = self.place.part
        if count == 1:
            return self.layer.change(self.target, value, self.strength)
        magnitudes = self.layer.parts.get("dora_scale")
        if magnitudes is not None and magnitudes.numel() != count * len(value):
            raise ValueError("its magnitudes are of inputs, whose norms are of the whole")
        # A row is changed by what belongs to it alone: the others' values do not matter, their number does.
        return self.layer.change(self.target, torch.cat([value] * count), self.strength).chunk(count)[part]


@dataclass(frozen=True, slots=True)
class _Match:
    """What one LoRA does to a checkpoint: (subfolder, tensor's name, update), what is left out, what to tell."""

    files: tuple[Path, ...]
    updates: Sequence[tuple[str, str, Update]]
    left_out: Sequence[str]
    notes: Sequence[str]


def fuse(checkpoint: Checkpoint, loras: Sequence[Lora], partial_: bool = False) -> Checkpoint:
    """The checkpoint with ``loras`` fused into its weights one after another, each weight when it is read, in
    float32, rounded once. With ``partial_``, what has no place in the checkpoint is left out, and recorded in
    ``source.loras`` and the notes. Raises InputError for what is no LoRA, not whole or for another model,
    CheckpointError for a damaged file."""
    updates: dict[str, dict[str, list[Update]]] = {}
    records: list[FusedLora] = []
    notes: list[str] = []
    files: list[Path] = []
    for lora in loras:
        match = _matched(checkpoint, lora, partial_)
        files += match.files
        for subfolder, name, update in match.updates:
            updates.setdefault(subfolder, {}).setdefault(name, []).append(update)
        records.append(
            FusedLora(
                name=lora.path.name, weight=lora.weight, parts=dict(lora.parts), left_out=tuple(match.left_out)
            )
        )
        notes += match.notes
    models = {
        subfolder: replace(
            model, tensors=partial(_fused, model.tensors, updates[subfolder]), files=(*model.files, *files)
        )
        if subfolder in updates
        else model
        for subfolder, model in checkpoint.models.items()
    }
    source = checkpoint.source.model_copy(update={"loras": (*checkpoint.source.loras, *records)})
    return replace(checkpoint, models=models, source=source, notes=(*checkpoint.notes, *notes))


def _fused(
    tensors: Callable[[], Mapping[str, torch.Tensor]], updates: Mapping[str, Sequence[Update]]
) -> Mapping[str, torch.Tensor]:
    return Computed(tensors(), {name: partial(_with_updates, name, own) for name, own in updates.items()})


def _with_updates(name: str, updates: Sequence[Update], weight: torch.Tensor) -> torch.Tensor:
    fused = weight.float()
    for update in updates:
        try:
            fused = update.apply(fused)
        except ValueError as error:
            raise InputError(f"--lora {update.layer.path}: {update.layer.title}: {error}") from error
    # What had no room in float16 before is not this LoRA's fault: the export keeps such weights in float32.
    if not _storable(fused) and _storable(weight):
        raise InputError(_blame(name, weight, updates))
    return fused.to(least_float16(weight))


def _storable(weight: torch.Tensor) -> bool:
    """Whether float16 has room for every element; no NaN has."""
    low, high = (float(value) for value in weight.float().aminmax())
    return low >= -FLOAT16_MAX and high <= FLOAT16_MAX


def _blame(name: str, weight: torch.Tensor, updates: Sequence[Update]) -> str:
    """Which of the updates makes a weight that cannot be stored, and how."""
    value = weight.float()
    for update in updates:
        value = update.apply(value)
        if not _storable(value):
            break
    layer = update.layer
    for part, tensor in layer.parts.items():
        if not bool(tensor.float().isfinite().all()):
            return (
                f"--lora {layer.path}: {layer.names[part]} holds infinite or undefined values: the file is damaged"
            )
    return (
        f"--lora {layer.path}: {layer.title} makes {name} too large for float16 (over {FLOAT16_MAX:.0f}) at "
        f"weight {update.strength:g}: the file is damaged, or for another model"
    )


def _matched(checkpoint: Checkpoint, lora: Lora, partial_: bool) -> _Match:
    """Every layer of a LoRA with its place; all must have one unless ``partial_``."""
    file = lora_file.read(lora.path)
    denoiser = FAMILIES[checkpoint.family].denoiser.component  # what trainers call a UNet, whatever it is
    layers = [replace(one, subfolder=denoiser) if one.subfolder == "unet" else one for one in file.layers]
    found = {subfolder: places(checkpoint, subfolder) for subfolder in {layer.subfolder for layer in layers}}
    _check_blocks(lora, found.get("unet") or places(checkpoint, "unet"))
    updates: list[tuple[str, str, Update]] = []
    strangers, beyond, misfits = list(file.unknown), list[str](), dict[str, Layer]()
    for layer in layers:
        network = found[layer.subfolder]
        if layer.module not in network:
            (beyond if _is_beyond(layer, network) else strangers).extend(layer.names.values())
        try:
            for place in network.get(layer.module, ()):
                updates += _updates(layer, place, _strength(lora, layer.subfolder, place.block))
        except ValueError as error:
            misfits[f"{layer.title}: {error}"] = layer
    if misfits and not (partial_ or strangers):
        raise InputError(
            f"{file.path}: made for another model than this {checkpoint.family}: {next(iter(misfits))}"
        )
    if (strangers and not partial_) or not updates:
        raise InputError(
            f"{file.path}: {len(strangers)} of its {file.size} tensors match nothing in this {checkpoint.family} "
            f"checkpoint: {listed(strangers)}; expected a LoRA made for this kind of model"
            + (" (with --lora-partial, the rest is fused)" if updates else "")
        )
    strangers += [name for layer in misfits.values() for name in layer.names.values()]
    notes = list(file.notes)
    if beyond:
        notes.append(f"{file.path.name}: for a text encoder with more layers; left out: {listed(beyond)}")
    if strangers:
        notes.append(f"{file.path.name}: fused in part; left out {len(strangers)} tensors: {listed(strangers)}")
    used = [entry for entry in updates if entry[2].strength]
    return _Match(file.files, used, [*beyond, *strangers], notes)


def _updates(layer: Layer, place: Place, strength: float) -> Iterator[tuple[str, str, Update]]:
    """Raises ValueError where the module lacks what the layer changes, or has it in another shape."""
    on_meta = replace(layer, parts={part: value.to("meta") for part, value in layer.parts.items()})
    for target in layer.targets():
        if target not in place.tensors:
            if layer.optional(target):
                continue
            raise ValueError(f"this model has no {target} there")
        name, shape = place.tensors[target]
        try:
            Update(on_meta, target, strength, place).apply(torch.empty(shape, device="meta"))
        except ValueError as error:
            raise ValueError(f"{error}, but {layer.subfolder}'s {name} has {shape}") from error
        yield layer.subfolder, name, Update(layer, target, strength, place)


def _is_beyond(layer: Layer, network: Mapping[str, object]) -> bool:
    """Whether a layer is for the end of a text encoder that this checkpoint's lacks: "skipped" layers are often cut
    off, as the last one of Stable Diffusion 2 is."""
    number = TEXT_LAYER.match(layer.module)
    return number is not None and int(number[1]) >= text_layers(network) > 0


def _check_blocks(lora: Lora, unet: Mapping[str, tuple[Place, ...]]) -> None:
    blocks = sorted({place.block for several in unet.values() for place in several} - {""})
    for part, _ in lora.parts:
        if part.startswith(("in", "out", "mid")) and part not in blocks:
            raise InputError(
                f"{lora.path}: weight for {part}, which this UNet does not have: it has {', '.join(blocks)}"
            )


_PARTS = {
    "unet": ("unet",),
    "transformer": ("unet",),
    "text_encoder": ("te1", "te"),
    "text_encoder_2": ("te2", "te"),
    "text_encoder_3": ("te",),
}


def _strength(lora: Lora, subfolder: str, block: str) -> float:
    """The most particular weight that was given: of the block, of the network, of all."""
    given = dict(lora.parts)
    return next((given[name] for name in (block, *_PARTS[subfolder]) if name in given), lora.weight)
