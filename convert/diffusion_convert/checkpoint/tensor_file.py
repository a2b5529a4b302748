"""One file of named tensors, .safetensors or pickled, told apart by content and not by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_ZIP_MAGIC = b"PK"


@dataclass(frozen=True, slots=True)
class TensorFile:
    """``tensors`` are views of the mapped file. ``scalars`` are the numbers beside them (``global_step``)."""

    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, int | float | str] = field(default_factory=dict)


def read(path: Path) -> TensorFile:
    """Map the tensors of a file; no values are read. Raises CheckpointError for anything else."""
    from diffusion_convert.checkpoint import unpickle

    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if magic == _ZIP_MAGIC or path.suffix in (".ckpt", ".pt", ".bin", ".pth"):
        pickled = unpickle.load(path)
        return TensorFile(pickled.tensors, pickled.scalars)
    return TensorFile(_read_safetensors(path))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or not a .safetensors file: {error}") from error
