"""Stand-ins for large weights: a network is traced and converted without its weights, which are fetched as they
are written.

Tracing and converting need shapes, not values, but coremltools keeps every constant as an array. A placeholder has
the shape of its weight and the storage of one column: every row is filled with a code, the first row with the
code negated. The code is one of float16's own numbers and each weight has its own, so it survives the conversion
to float16, coremltools' search for equal constants never merges two, and an array that comes out of the converter
tells which weight it stands for. The negated row shows whether the rows are still where they were: what a pass
has transposed, scaled or folded is noticed (`Misplaced`), never written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from diffusion_convert.checkpoint.tensor_file import let_go
from diffusion_runtime.errors import CheckpointError

FLOAT16_MAX = 65504.0
MIN_SIZE = 1024
"""Weights with fewer elements keep their values: biases, norms, and what a pass may want to look at."""

_FIRST_CODE = 0x3C00  # 1.0 as float16's bits; up to 0x7BFF follow 16,384 numbers in ascending order
_CODES = 0x7C00 - _FIRST_CODE


class Misplaced(Exception):
    """Placeholders came out of the converter other than they went in, or not at all: those weights, ``names``, must
    be converted by value."""

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = frozenset(names)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight, read when it is needed: it may have to be computed."""

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]

    def read(self) -> torch.Tensor:
        return self.tensors[self.name]


class Placeholders:
    """Hands out placeholders and finds the weights that they stand for. Where not ``enabled``, hands out the
    weights themselves, as it does for those named in ``by_value``."""

    def __init__(self, enabled: bool = True, by_value: frozenset[str] = frozenset()) -> None:
        self._enabled = enabled
        self._by_value = by_value
        self._weights: list[_Weight] = []
        self._expected: set[int] = set()
        self._taken: set[int] = set()
        self._exceeding: dict[int, bool] = {}

    def view(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``tensors`` with placeholders for the large ones; floating point as float32. They are numbered by their
        names: the same network is traced the same, in whatever order a file has its weights."""
        return {name: self._stand_in(name, tensors[name], tensors) for name in sorted(tensors)}

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say which placeholders went into the network: each must come out (`check_all_taken`)."""
        found = (self.find(tensor.numpy()) for tensor in tensors)
        self._expected = {index for index in found if index is not None}

    def find(self, array: np.ndarray) -> int | None:
        """The number of the weight that ``array`` stands for; None where it is no placeholder."""
        if array.dtype not in (np.float16, np.float32) or array.size < MIN_SIZE:
            return None
        code = array.flat[-1]  # wherever the rows went, the first element is negative and the last is not
        if array.flat[0] != -code or not 0 < code <= FLOAT16_MAX or np.float16(code) != code:
            return None
        index = int(np.float16(code).view(np.uint16)) - _FIRST_CODE
        known = 0 <= index < len(self._weights)
        return index if known and bool((np.abs(thin(array)) == code).all()) else None

    def take(self, array: np.ndarray) -> tuple[str, torch.Tensor] | None:
        """The name and the values of the weight that ``array`` stands for, in its shape; None where it is no
        placeholder. Raises Misplaced if its elements are in another order, unless it is a transposed matrix."""
        index = self.find(array)
        if index is None:
            return None
        weight = self._weights[index]
        tensor = weight.read()
        if _rows_in_place(array, weight.shape):
            ordered = tensor
        # coremltools stores the weight of a matrix product transposed where it makes a `linear` of it.
        elif len(weight.shape) == 2 and _rows_in_place(_squeezed(array).T, weight.shape):
            ordered = tensor.t()
        else:
            raise Misplaced(f"{weight.name} of shape {weight.shape} became {array.shape}", [weight.name])
        self._taken.add(index)
        return weight.name, ordered.reshape(array.shape)

    def exceeds_float16(self, index: int) -> bool:
        """Whether an element of that weight is beyond float16. Types that are no wider than float16 have none."""
        # A weight is read once for all operations that use it: it may be computed (LoRAs) or on a slow disk.
        if index not in self._exceeding:
            tensor = self._weights[index].read()
            wider = tensor.dtype.itemsize > 2 or tensor.dtype == torch.bfloat16
            self._exceeding[index] = wider and bool(max(map(abs, map(float, torch.aminmax(tensor)))) > FLOAT16_MAX)
            let_go(tensor)
        return self._exceeding[index]

    def exceeding(self) -> tuple[str, ...]:
        """The names of the weights that were found to be beyond float16."""
        return tuple(sorted(self._weights[index].name for index, exceeds in self._exceeding.items() if exceeds))

    def check_unused(self, names: Iterable[str]) -> None:
        """Raise Misplaced where one of the weights of these names, of which something is computed, is no weight."""
        used = sorted(set(names).intersection(weight.name for weight in self._weights))
        if used:
            raise Misplaced(f"the network is built with the values of {', '.join(used)}", used)

    def check_all_taken(self) -> None:
        """Raise Misplaced where a placeholder did not come out: a pass has folded it into something else."""
        missing = [self._weights[index].name for index in sorted(self._expected - self._taken)]
        if missing:
            listed = f"{', '.join(missing[:3])} ({len(missing)} in all)"
            raise Misplaced(f"{listed} did not come out of the converter", missing)

    def _stand_in(self, name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        small = tensor.numel() < MIN_SIZE or tensor.ndim < 2 or tensor.shape[0] < 2
        if small or not self._enabled or name in self._by_value or len(self._weights) == _CODES:
            return _finite(name, tensor.float())
        code = float(np.uint16(_FIRST_CODE + len(self._weights)).view(np.float16))
        self._weights.append(_Weight(name, tuple(tensor.shape), tensors))
        column = torch.full((tensor.shape[0], *[1] * (tensor.ndim - 1)), code)
        column[0] = -code
        # Strides of 0: the shape of the weight in the memory of one column.
        return column.expand(tensor.shape)


def is_finite(values: torch.Tensor) -> bool:
    """Whether all elements, at least one, are finite: as ``isfinite``, but in a tenth of the time and no memory."""
    return all(map(math.isfinite, values.aminmax()))


def _finite(name: str, values: torch.Tensor) -> torch.Tensor:
    if values.numel() and not is_finite(values):
        raise CheckpointError(f"the weight {name} has an infinite or undefined value: the checkpoint is damaged")
    return values


def _rows_in_place(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether ``array`` holds a placeholder's elements in the order of a weight of that shape."""
    if not array.ndim or array.size != math.prod(shape) or len(array) != shape[0]:
        return False
    rows = thin(array)
    rows = rows.reshape(len(rows), -1)
    return len(rows) == shape[0] and bool((rows[0] < 0).all() and (rows[1:] > 0).all())


def _squeezed(array: np.ndarray) -> np.ndarray:
    return array.reshape([size for size in array.shape if size > 1])


def thin(array: np.ndarray) -> np.ndarray:
    """``array`` without its repetitions: axes along which the same element is repeated have length 1."""
    axes = zip(array.strides, array.shape, strict=True)
    return array[tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None) for stride, size in axes)]
