"""LoRA files and folders as layers, whatever the trainer called them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import tensor_file
from diffusion_convert.checkpoint.lora import names, settings
from diffusion_convert.checkpoint.lora.kinds import Layer, Parts, kind_of
from diffusion_convert.checkpoint.lora.settings import Settings
from diffusion_runtime.errors import InputError

FILE_NAMES = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Folders of a folder that peft saved adapters of several networks to."""
_SGM_BLOCK = re.compile(r"(?:input|output)_blocks[._]|middle_block[._]")
_DIFFUSERS_BLOCK = re.compile(r"(?:down|up)_blocks[._]|mid_block[._]")
_NO_LORA = re.compile("scheduler|optimizer|checkpoint")
"""In the names of weight files that trainers leave next to a LoRA, and that diffusers ignores."""


@dataclass(frozen=True, slots=True)
class LoraFile:
    """``files`` are those that were read; ``unknown`` are names in them of no known form; ``notes`` are sentences
    for the user."""

    path: Path
    files: tuple[Path, ...]
    layers: Sequence[Layer]
    unknown: Sequence[str]
    size: int
    notes: Sequence[str] = ()


def read(path: Path) -> LoraFile:
    """The layers of a LoRA file, or of the LoRA in a folder. Raises InputError if it is not a LoRA or not complete,
    CheckpointError for a damaged file."""
    if not path.is_dir():
        return _read_one(path, None)
    inside = {name: _in_folder(path / name) for name in NETWORKS if (path / name).is_dir()}
    found = [(file, name) for name, file in inside.items() if file is not None]
    if not found:
        if (file := _in_folder(path)) is None:
            raise InputError(f"{path}: expected one LoRA file in this folder, found 0")
        return _read_one(file, path.name if path.name in NETWORKS else None)
    files = [_read_one(file, subfolder) for file, subfolder in found]
    return LoraFile(
        path,
        tuple(path for file in files for path in file.files),
        [layer for file in files for layer in file.layers],
        [name for file in files for name in file.unknown],
        sum(file.size for file in files),
        [note for file in files for note in file.notes],
    )


def _in_folder(folder: Path) -> Path | None:
    """The LoRA file of a folder: one that a library wrote, else the only file of weights. None: there is none."""
    found = [folder / name for name in FILE_NAMES if (folder / name).is_file()][:1] or sorted(
        path for path in folder.glob("*.safetensors") if not _NO_LORA.search(path.name)
    )
    if len(found) > 1:
        raise InputError(f"{folder}: expected one LoRA file in this folder, found {len(found)}: name one of them")
    return found[0] if found else None


def _read_one(path: Path, subfolder: str | None) -> LoraFile:
    """``subfolder`` is the network that the file is for where its names do not tell."""
    file = tensor_file.read(path)
    tensors = {**file.tensors, **_numbers(file.scalars)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors: expected a LoRA")
    tensors, twins = _written_once(tensors)
    for name in tensors:
        if (kind := names.other_kind(name)) is not None:
            raise InputError(f"{path}: {name} is of {kind}, which is not covered")
    beside, headers = settings.beside(path), settings.in_header(path, file.scalars)
    found, unknown = _grouped(path, tensors, subfolder)
    layers = [
        _layer(path, network, module, {part: (name, tensors[name]) for part, name in by_part.items()}, own)
        for (network, _), (module, by_part) in found.items()
        for own in (beside or headers.get(network),)
    ]
    notes = [*_notes(path, file.scalars, layers, beside or headers or None)]
    if twins:
        notes.append(
            f"{path.name}: has the UNet's layers under diffusers' and Stability AI's names: the latter are left out"
        )
    return LoraFile(path, settings.files(path), layers, unknown, len(tensors), notes)


def _written_once(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """Without the layers under Stability AI's names where the file has some under diffusers' names, too: diffusers
    leaves them out; and whether there were any."""
    if not any(_DIFFUSERS_BLOCK.search(name) for name in tensors):
        return tensors, False
    kept = {name: value for name, value in tensors.items() if not _SGM_BLOCK.search(name)}
    return kept, len(kept) < len(tensors)


def _grouped(
    path: Path, tensors: Iterable[str], subfolder: str | None
) -> tuple[dict[tuple[str, str], tuple[str, dict[str, str]]], list[str]]:
    """By network and plain module: the module as the file writes it and its tensors' names by part; and the names
    that are of no known form."""
    found: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}
    unknown = []
    for name in tensors:
        if (tag := names.parse(name)) is None:
            unknown.append(name)
            continue
        network = tag.subfolder or subfolder or names.guess(tag.module)
        _, by_part = found.setdefault((network, names.plain(tag.module)), (tag.module, {}))
        if (twin := by_part.setdefault(tag.part, name)) != name:
            raise InputError(f"{path}: {twin} and {name} are the same part of the same layer: expected one of them")
    for _, by_part in found.values():
        if "ia3" in by_part and "on_input" not in by_part:  # the name of any network's weight
            unknown.append(by_part.pop("ia3"))
    return {place: layer for place, layer in found.items() if layer[1]}, unknown


def _numbers(scalars: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Alphas that a pickled file holds as plain numbers."""
    return {
        name: torch.tensor(float(value))
        for name, value in scalars.items()
        if name.endswith(".alpha") and isinstance(value, (int, float))
    }


def _layer(
    path: Path,
    subfolder: str,
    module: str,
    named: Mapping[str, tuple[str, torch.Tensor]],
    own: Settings | None,
) -> Layer:
    by_part = {part: name for part, (name, _) in named.items()}
    parts = {part: value for part, (_, value) in named.items()}
    first = next(iter(by_part.values()))
    kind = kind_of(parts)
    if kind is None:
        raise InputError(f"{path}: {first} stands alone: expected the layer that it belongs to")
    if missing := kind.missing(parts):
        raise InputError(
            f"{path}: {first} stands alone: expected a whole layer of a {kind.name}, and {_titles(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    if strange := [by_part[part] for part in parts if part not in kind.own() | kind.may]:
        raise InputError(f"{path}: {strange[0]} is no part of a {kind.name}, as {first} is")
    for part, value in parts.items():
        _check(path, by_part[part], part, value)
    scale = 1.0
    if "alpha" in parts and kind.name != "difference":
        scale = float(parts["alpha"]) / (kind.rank(parts) or float(parts["alpha"]) or 1.0)
    elif own is not None and kind.product is not None:
        scale = own.scale(module, kind.rank(parts))
    on_input = _on_input(parts, module, own)
    return Layer(path, subfolder, names.plain(module), kind, parts, by_part, scale, on_input)


def _titles(parts: Sequence[str]) -> str:
    """The parts as most files call them."""
    titles = {"down": "lora_down.weight", "up": "lora_up.weight", "ia3": "weight"}
    return ", ".join(titles.get(part, part) for part in parts)


def _check(path: Path, name: str, part: str, value: torch.Tensor) -> None:
    whole = part in ("on_input", "bias_indices", "bias_size")
    if not value.is_floating_point() and not whole and part != "alpha":
        raise InputError(f"{path}: {name} is of type {str(value.dtype).removeprefix('torch.')}: expected floats")
    if part in ("alpha", "on_input"):
        if value.numel() != 1 or value.is_complex():
            raise InputError(f"{path}: {name} is no single number")
        return
    vectors = ("bias", "diff", "diff_b", "ia3", "ia3_l", "magnitude", "dora_scale", "new_weight", "new_bias")
    vector = part in vectors or part.startswith("bias_")
    if not value.numel() or not (vector or value.ndim in (2, 4)) or value.ndim > 4:
        raise InputError(f"{path}: {name} has shape {tuple(value.shape)}: expected a matrix or a convolution")


def _on_input(parts: Parts, module: str, own: Settings | None) -> bool:
    if "on_input" in parts:
        return bool(parts["on_input"])
    if "ia3_l" not in parts:
        return False
    vector = parts["ia3_l"]
    if vector.ndim == 2 and vector.numel() > 1:  # of a linear layer: (outputs, 1) or (1, inputs)
        return vector.shape[0] == 1
    return own is not None and own.scales_input(module)


def _notes(path: Path, header: Mapping[str, Any], layers: Sequence[Layer], own: object | None) -> Iterator[str]:
    scaled = [layer for layer in layers if layer.kind.rank(layer.parts) is not None]
    if own is not None or not scaled or any("alpha" in layer.parts for layer in scaled):
        return
    alpha, rank = header.get("ss_network_alpha"), header.get("ss_network_dim")
    if alpha is not None and alpha != rank:
        yield (
            f"{path.name}: its header says ss_network_alpha {alpha} (of {rank}), its layers have no alpha: not "
            "used, as by its trainer and diffusers; a weight can make up for it"
        )
    elif any(name.startswith("base_model.") for layer in scaled for name in layer.names.values()):
        yield f"{path.name}: has no {settings.CONFIG_NAME} next to it: its alpha is taken to be its rank"
