"""Files in the GGUF format: weights quantised in blocks, decoded by the package ``gguf`` when they are used.

The header is read here and not by that package: its reader follows any count that a file claims, without end.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_convert.checkpoint.computed import TensorFile
from diffusion_convert.checkpoint.tensor_file import GGUF_MAGIC
from diffusion_runtime.errors import CheckpointError, InstallationError

VERSIONS = (2, 3)
MAX_HEADER, MAX_DIMENSIONS, MAX_KEPT = 100_000_000, 4, 8
"""Bytes before the weights, as in safetensors; dimensions of a weight; elements of an array that are kept."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    0: "float32",
    1: "float16",
    24: "int8",
    25: "int16",
    26: "int32",
    27: "int64",
    28: "float64",
    30: "bfloat16",
}
"""The types of GGUF that torch has, too."""
_SHAPE = "comfy.gguf.orig_shape."
"""Under this stands the shape of a weight that was reshaped to rows that a block fits."""
_UNET = ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight")
"""A UNet has one of these, whatever stands before it."""


@dataclass(slots=True)
class _Header:
    """Reads numbers and texts in order. Raises ValueError where the bytes end."""

    data: memoryview
    at: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends before its header does, which claims {size} bytes at {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(count):
                self.take(self.number("Q"))
            return None
        if kind not in _SCALARS:
            raise ValueError(f"an array of type {kind}")
        code = _SCALARS[kind]
        elements = self.take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", elements) if count <= MAX_KEPT else None


def is_one(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False  # who reads it next says why


def read(path: Path) -> TensorFile:
    """Map the weights of a file; quantised ones stand on the device "meta" in the shape that they are decoded to,
    and ``packed`` has how. Raises CheckpointError for a damaged file and one without a UNet, InstallationError
    where the package is missing."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch takes none that is read-only
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        tensors, packed, values = _tensors(mapped)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}: damaged, or of no kind that is covered") from error
    if not any(name.endswith(_UNET) for name in tensors):
        what = values.get("general.architecture", "unknown")
        raise CheckpointError(
            f"{path}: a GGUF file of architecture {str(what)[:80]!r}, without a UNet: expected Stable Diffusion's"
        )
    return TensorFile(
        tensors, {name: value for name, value in values.items() if isinstance(value, int | float | str)}, packed
    )


def _tensors(
    mapped: mmap.mmap,
) -> tuple[dict[str, torch.Tensor], dict[str, Callable[[], torch.Tensor]], Mapping[str, Any]]:
    header = _Header(memoryview(mapped)[:MAX_HEADER], len(GGUF_MAGIC))
    if (version := header.number("I")) not in VERSIONS:
        raise ValueError(f"GGUF of version {version}, expected 2 or 3")
    weights, values = header.number("Q"), header.number("Q")
    for _ in range(values):
        name = header.text()
        header.values[name] = header.value(header.number("I"))
    places = [_place(header) for _ in range(weights)]
    alignment = header.values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {str(alignment)[:80]}, expected a power of two from 8")
    start = math.ceil(header.at / alignment) * alignment
    tensors, packed = dict[str, torch.Tensor](), dict[str, Callable[[], torch.Tensor]]()
    for name, shape, kind, offset in places:
        if name in tensors:
            raise ValueError(f"two weights are called {name[:200]!r}")
        if offset % alignment:
            raise ValueError(f"{name[:200]} does not lie at a multiple of {alignment}")
        shown = _shown(header.values.get(f"{_SHAPE}{name}"), shape, name)
        found = _tensor(mapped, name, shape, kind, start + offset)
        if not callable(found):
            tensors[name] = found.reshape(shown)
        elif len(shown) == 1:  # few, and the only ones whose values are looked at before they are used
            tensors[name] = found(shown)
        else:
            tensors[name] = torch.empty(shown, dtype=torch.float16, device="meta")
            packed[name] = partial(found, shown)
    return tensors, packed, header.values


def _place(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """A weight's name, its shape with the rows last, its type and where it begins."""
    name, dimensions = header.text(), header.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{name[:200]} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    # GGUF names the dimension first whose elements lie side by side, torch last.
    shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise ValueError(f"{name[:200]} is empty")
    return name, shape, header.number("I"), header.number("Q")


def _shown(given: Any, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The shape that a weight had before it was put into rows that blocks fit."""
    if given is None:
        return shape
    whole = isinstance(given, tuple) and all(isinstance(size, int) and size > 0 for size in given)
    if not whole or math.prod(given) != math.prod(shape):
        raise ValueError(f"{name[:200]} of shape {shape} cannot have been of shape {str(given)[:80]}")
    return tuple(given)


def _tensor(
    mapped: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, at: int
) -> torch.Tensor | Callable[[tuple[int, ...]], torch.Tensor]:
    """The weight, or what decodes it to a given shape."""
    count = math.prod(shape)
    dtype = getattr(torch, _PLAIN[kind]) if kind in _PLAIN else None
    block, size = (1, dtype.itemsize) if dtype is not None else _blocks(kind)
    if shape[-1] % block:
        raise ValueError(f"{name[:200]} has rows of {shape[-1]}, expected a multiple of {block}")
    if at + (length := count // block * size) > len(mapped):
        raise ValueError(f"it ends before {name[:200]}, of shape {shape}")
    if dtype is not None:
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=at)
    rows = np.frombuffer(mapped, np.uint8, length, at).reshape(-1, shape[-1] // block * size)
    return partial(_decode, rows, kind)


@cache
def _blocks(kind: int) -> tuple[int, int]:
    """How many values a block of a quantised type holds, and in how many bytes."""
    gguf = _package()
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, LookupError, RuntimeError):
        raise ValueError(f"weights of type {kind}, which the package gguf cannot decode") from None
    return int(block), int(size)


def _decode(rows: np.ndarray[Any, Any], kind: int, shape: tuple[int, ...]) -> torch.Tensor:
    gguf = _package()
    with np.errstate(all="ignore"):  # whatever a damaged file's scales make of it, as in any other format
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind))
    return torch.from_numpy(values.reshape(shape)).half()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InstallationError("GGUF files need the package gguf: pip install 'coreml-sd[gguf]'") from error
    return gguf
