"""TAESD as its makers publish it: an encoder and a decoder in a file each, by the names of their own sequences.

What diffusers calls ``layers`` is the same sequence; its decoder lacks the clamp that stands first in theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import config_models, tensor_file
from diffusion_convert.checkpoint.model import Submodel
from diffusion_runtime.errors import CheckpointError

CLASS_NAME = "AutoencoderTiny"
BLOCKS: Mapping[str, Any] = {"num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1]}
"""How many blocks each resolution has, in all that are published."""
_PARTS = ("encoder", "decoder")
_NAME = re.compile(r"(\d+)\.((?:conv\.\d+\.|skip\.)?(?:weight|bias))")
_CLAMP = {"encoder": 0, "decoder": 1}
"""How many layers of theirs diffusers' sequence lacks, at the beginning."""


def is_half(names: Mapping[str, Any]) -> bool:
    """Whether a file's tensors are those of an encoder or a decoder of that kind alone."""
    return bool(names) and all(_NAME.fullmatch(name) for name in names)


def from_halves(path: Path) -> Submodel:
    """The VAE of which ``path`` is a half; the other lies beside it, under the same name with "encoder" and
    "decoder" exchanged. Raises CheckpointError where it does not, and for other tensors than TAESD's."""
    files = {part: _beside(path, part) for part in _PARTS}
    first = {part: _layers(file, part).get(f"{part}.layers.0.weight") for part, file in files.items()}
    shapes = {part: tuple(weight.shape) if weight is not None else () for part, weight in first.items()}
    if wrong := [part for part in _PARTS if len(shapes[part]) != 4]:
        raise CheckpointError(f"{files[wrong[0]]}: no {wrong[0]} of TAESD: its first layer is no convolution")
    (width, pictures), (widths, latents) = (shapes[part][:2] for part in _PARTS)
    config = {
        "_class_name": CLASS_NAME,
        **BLOCKS,
        "encoder_block_out_channels": [width] * 4,
        "decoder_block_out_channels": [widths] * 4,
        "in_channels": pictures,
        "out_channels": pictures,
        "latent_channels": latents,
    }
    config = config_models.checked(CLASS_NAME, config, str(path))
    return Submodel(CLASS_NAME, config, partial(_read, files), tuple(files.values()))


def _beside(path: Path, part: str) -> Path:
    """Of a file named …encoder… or …decoder…, the one of ``part``."""
    own = next((one for one in _PARTS if one in path.name), None)
    if own is None:
        raise CheckpointError(f"{path}: half of a TAESD, but its name says neither encoder nor decoder")
    start, _, end = path.name.rpartition(own)
    beside = path.with_name(f"{start}{part}{end}")
    if not beside.is_file():
        raise CheckpointError(f"{path}: half of a TAESD; {beside.name}, which belongs to it, is not beside it")
    return beside


def _layers(path: Path, part: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in tensor_file.read(path).tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path}: no {part} of TAESD: has a tensor {name}")
        found[f"{part}.layers.{int(match[1]) - _CLAMP[part]}.{match[2]}"] = value
    return found


def _read(files: Mapping[str, Path]) -> Mapping[str, torch.Tensor]:
    return {name: value for part, path in files.items() for name, value in _layers(path, part).items()}
