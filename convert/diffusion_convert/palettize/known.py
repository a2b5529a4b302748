"""Palettes that were made before, of weights with the same elements: variants and sizes of a network share them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffusion_runtime.errors import PackageError
from diffusion_runtime.mil.program import Blob, DType, TensorType, Value
from diffusion_runtime.mil.weights import WeightFile


@dataclass(frozen=True, slots=True)
class Stored:
    """A palette in a weight file, and its squared error."""

    indices: Value
    lut: Value
    squared_error: float

    def read(self, file: WeightFile) -> tuple[np.ndarray, np.ndarray]:
        """The table, and the bytes of the packed indices."""
        return file.read(*_place(file, self.lut)), file.packed(*_place(file, self.indices))


@dataclass(frozen=True, slots=True)
class Known:
    """Where palettes lie, by what they were made of (`key_of`). Their files are held mapped: they may be moved and
    removed."""

    _found: dict[Hashable, tuple[WeightFile, Stored]] = field(default_factory=dict)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._found

    def add(self, path: Path, keys: Sequence[Hashable], stored: Sequence[Stored]) -> None:
        """Those in the weight file ``path``."""
        file = WeightFile(path)
        self._found.update((key, (file, one)) for key, one in zip(keys, stored, strict=True))

    def read(self, key: Hashable) -> tuple[np.ndarray, np.ndarray, float]:
        """The table, the indices as they are stored, the squared error."""
        file, stored = self._found[key]
        file.release()  # of what was read before, or the whole file lies in memory in the end
        return *stored.read(file), stored.squared_error


def key_of(array: np.ndarray, *how: Hashable) -> Hashable:
    """What a palette follows from: the elements of a weight, and ``how`` it is made."""
    elements = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return hashlib.sha256(elements).digest(), array.dtype.str, *how


def _place(file: WeightFile, value: Value) -> tuple[int, DType, tuple[int, ...]]:
    if not isinstance(value.data, Blob) or not isinstance(value.type, TensorType):
        raise PackageError(f"{file.path}: a palette was not stored")
    return value.data.offset, value.type.dtype, tuple(size or 0 for size in value.type.shape)
