"""Values of a program that are known before it runs: literals, weights, compressed weights and their consequences.

Weights are read when asked for, not before: a constant is a promise of an array or a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_runtime.errors import PackageError, UnsupportedError
from diffusion_runtime.mil.program import DType, ListType, TensorType, Value, ValueType

# Unsigned types wider than 8 bits are held in the next wider signed type: torch computes little with them.
_TORCH = {
    DType.BOOL: torch.bool,
    DType.INT4: torch.int8,
    DType.INT8: torch.int8,
    DType.INT16: torch.int16,
    DType.INT32: torch.int32,
    DType.INT64: torch.int64,
    DType.UINT8: torch.uint8,
    DType.UINT16: torch.int32,
    DType.UINT32: torch.int64,
    DType.UINT64: torch.int64,
    DType.UINT1: torch.uint8,
    DType.UINT2: torch.uint8,
    DType.UINT3: torch.uint8,
    DType.UINT4: torch.uint8,
    DType.UINT6: torch.uint8,
}
_FLOATS = (DType.FLOAT16, DType.FLOAT32, DType.FLOAT64)


@dataclass(frozen=True, slots=True)
class Constant:
    """``load`` reads the stored array (or gives the string or list of strings); where the value was computed, its
    ``tensor`` is there instead."""

    type: ValueType
    load: Callable[[], Any] | None = None
    tensor: Tensor | None = None

    def array(self) -> np.ndarray:
        """The value in its stored element type."""
        value = self.tensor.numpy() if self.tensor is not None else self.load() if self.load else None
        if not isinstance(value, np.ndarray):
            raise UnsupportedError(f"a constant of type {self.type} where a tensor of numbers is expected")
        return value

    def python(self) -> Any:
        """A scalar as int, float, bool or str, else a (nested) list."""
        value = self.tensor if self.tensor is not None else self.load() if self.load else None
        if isinstance(value, np.ndarray | Tensor):
            return value.tolist()
        return value

    def as_tensor(self, float_dtype: torch.dtype) -> Tensor:
        """The value as the run computes with it; not copied where the element types are the same."""
        if self.tensor is not None:
            return self.tensor
        return to_tensor(self.array(), self.type, float_dtype)


def to_tensor(array: np.ndarray, kind: ValueType, float_dtype: torch.dtype) -> Tensor:
    """An array of MIL type ``kind`` as a tensor in the run's element type. PackageError: another shape."""
    wanted = torch_dtype(kind, float_dtype)
    if isinstance(kind, TensorType) and array.shape != kind.shape:
        raise PackageError(f"holds an array of shape {array.shape}, but {kind.shape} is declared")
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    tensor = _view(np.ascontiguousarray(array).reshape(array.shape))
    return tensor.to(wanted, copy=not array.flags.writeable)  # where weights are mapped, a write would be the end


def _view(array: np.ndarray) -> Tensor:
    """A tensor of the same memory, which may be read-only."""
    if not array.flags.writeable:
        _torch_has_warned()
    return torch.from_numpy(array)


@cache
def _torch_has_warned() -> None:
    """torch warns of the first tensor of read-only memory, and once: here, where nobody sees it."""
    with warnings.catch_warnings(action="ignore"):
        torch.from_numpy(np.frombuffer(b"\0", np.uint8))


def torch_dtype(kind: ValueType, float_dtype: torch.dtype) -> torch.dtype:
    """The element type in which the run holds values of ``kind``. Raises UnsupportedError where it holds none."""
    if isinstance(kind, TensorType) and kind.dtype in _FLOATS:
        return float_dtype
    if not isinstance(kind, TensorType) or kind.dtype not in _TORCH:
        raise UnsupportedError(f"a value of type {kind} is no tensor of numbers")
    return _TORCH[kind.dtype]


def literal(value: Value, read: Callable[[Value], np.ndarray]) -> Constant:
    """A program's literal; ``read`` gives the array of one that is stored in a weight file."""
    if isinstance(value.data, str):
        return Constant(value.type, lambda: value.data)
    if isinstance(value.type, ListType):
        return Constant(value.type, lambda: [literal(item, read).python() for item in value.data])  # type: ignore[union-attr, arg-type]
    return Constant(value.type, partial(read, value))
