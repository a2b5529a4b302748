"""An ML Program as frozen values: the one form in which programs are read, checked, rewritten, run and printed.

Names are MIL's (Core ML's ``MIL.proto``). Nothing here touches protobuf (``proto.py``), files (``weights.py``)
or torch (``lower.py``). Rewriting a program means ``dataclasses.replace``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from diffusion_runtime.errors import PackageError

MAX_ELEMENTS = 1 << 40
"""Of a tensor: far beyond every model, and far below what 64 bits count."""


class DType(enum.Enum):
    """Element types; the value is the spelling in MIL text (``tensor<fp16, [2, 4]>``)."""

    BOOL = "bool"
    STRING = "string"
    FLOAT16 = "fp16"
    FLOAT32 = "fp32"
    FLOAT64 = "fp64"
    INT4 = "int4"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    UINT1 = "uint1"
    UINT2 = "uint2"
    UINT3 = "uint3"
    UINT4 = "uint4"
    UINT6 = "uint6"
    UINT8 = "uint8"
    UINT16 = "uint16"
    UINT32 = "uint32"
    UINT64 = "uint64"


@dataclass(frozen=True, slots=True)
class TensorType:
    """``shape`` is () for a scalar; None stands for a dimension that is unknown until run time.

    Raises PackageError for more than `MAX_ELEMENTS`, sizes of 0 left out: numpy and torch multiply those too, in
    64 bits, when they lay out a tensor without elements.
    """

    dtype: DType
    shape: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if math.prod(size or 1 for size in self.shape) > MAX_ELEMENTS:
            sizes = ", ".join("?" if size is None else str(size)[:20] for size in self.shape[:8])
            raise PackageError(f"a tensor of shape [{sizes}] is beyond {MAX_ELEMENTS} elements")


@dataclass(frozen=True, slots=True)
class ListType:
    element: ValueType
    length: int | None = None


@dataclass(frozen=True, slots=True)
class TupleType:
    elements: tuple[ValueType, ...]


@dataclass(frozen=True, slots=True)
class DictType:
    key: ValueType
    value: ValueType


@dataclass(frozen=True, slots=True)
class StateType:
    wrapped: ValueType


ValueType = TensorType | ListType | TupleType | DictType | StateType


@dataclass(frozen=True, slots=True)
class Blob:
    """Where a value's bytes are: ``path`` as MIL spells it (``@model_path/weights/weight.bin``), and the offset
    of the blob's 64-byte metadata record in that file."""

    path: str
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A literal. ``data`` by type of ``type``:

    TensorType of STRING -> a str (rank 0) or a numpy object array of str; other TensorType -> a numpy array of
    exactly ``type.shape`` (sub-byte types unpacked, one element per uint8/int8) or a ``Blob``;
    ListType, TupleType -> tuple[Value, ...]; DictType -> tuple[tuple[Value, Value], ...].
    Equality compares types and bits (so NaN equals NaN, 0.0 differs from -0.0).
    """

    type: ValueType
    data: np.ndarray | Blob | str | tuple[Value, ...] | tuple[tuple[Value, Value], ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value):
            return NotImplemented
        if self.type != other.type or type(self.data) is not type(other.data):
            return False
        if isinstance(self.data, np.ndarray) and isinstance(other.data, np.ndarray):
            if object in (self.data.dtype, other.data.dtype):
                return bool(self.data.tolist() == other.data.tolist())
            return (
                self.data.dtype == other.data.dtype
                and self.data.shape == other.data.shape
                and self.data.tobytes() == other.data.tobytes()
            )
        return bool(self.data == other.data)

    __hash__ = None  # type: ignore[assignment]  # arrays are compared, never used as keys


@dataclass(frozen=True, slots=True)
class Variable:
    """A typed name: a function's or block's input, or an operation's output."""

    name: str
    type: ValueType


@dataclass(frozen=True, slots=True)
class Operation:
    """``inputs`` maps a parameter to its bindings (several for the values of ``concat``); a binding is the name
    of an earlier variable or a literal. ``const`` carries its value in ``attributes["val"]``."""

    type: str
    inputs: Mapping[str, tuple[str | Value, ...]]
    outputs: tuple[Variable, ...]
    attributes: Mapping[str, Value] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()

    @property
    def values(self) -> tuple[tuple[str, Value], ...]:
        """Those that the operation itself holds, by attribute or parameter."""
        bound = ((name, one) for name, bindings in self.inputs.items() for one in bindings)
        return (*self.attributes.items(), *((name, one) for name, one in bound if isinstance(one, Value)))


@dataclass(frozen=True, slots=True)
class Block:
    """``outputs`` are names. ``inputs`` are empty but in nested blocks."""

    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    inputs: tuple[Variable, ...] = ()
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Function:
    """``opset`` ("CoreML5" … "CoreML8") names the block that runs."""

    inputs: tuple[Variable, ...]
    opset: str
    blocks: Mapping[str, Block]
    attributes: Mapping[str, Value] = field(default_factory=dict)

    @property
    def block(self) -> Block:
        return self.blocks[self.opset]


@dataclass(frozen=True, slots=True)
class Program:
    """``version`` is the protobuf's integer (1)."""

    functions: Mapping[str, Function]
    version: int = 1
    attributes: Mapping[str, Value] = field(default_factory=dict)
    doc_string: str = ""


@dataclass(frozen=True, slots=True)
class Feature:
    """One input, output or state of the model as its description declares it.

    ``shape`` is the default shape; ``shape_range`` holds (lower, upper) per dimension (upper -1: unbounded) where
    the shape is flexible by ranges; ``enumerated_shapes`` where it is by enumeration. ``kind`` is
    "multiArray", "image", "state", …; ``dtype`` the declared element type ("Float16", "Double", "Int32", …).
    """

    name: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    shape_range: tuple[tuple[int, int], ...] = ()
    enumerated_shapes: tuple[tuple[int, ...], ...] = ()
    optional: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True)
class FunctionInterface:
    """Inputs, outputs and states of one function; ``name`` is "main" where the description names none."""

    name: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...] = ()


@dataclass(frozen=True, slots=True)
class Metadata:
    """What Core ML shows of a model. ``user_defined`` keeps the file's order."""

    description: str = ""
    version: str = ""
    author: str = ""
    license: str = ""
    user_defined: Mapping[str, str] = field(default_factory=dict)


_NUMPY = {
    DType.BOOL: "bool",
    DType.STRING: "object",
    DType.FLOAT16: "float16",
    DType.FLOAT32: "float32",
    DType.FLOAT64: "float64",
    DType.INT4: "int8",
    DType.UINT1: "uint8",
    DType.UINT2: "uint8",
    DType.UINT3: "uint8",
    DType.UINT4: "uint8",
    DType.UINT6: "uint8",
}
_PACKED_BITS = {DType.INT4: 4, DType.UINT1: 1, DType.UINT2: 2, DType.UINT3: 3, DType.UINT4: 4, DType.UINT6: 6}


@cache
def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy dtype that holds one (unpacked) element, little-endian as in files."""
    return np.dtype(_NUMPY.get(dtype, dtype.value)).newbyteorder("<")


def packed_bits(dtype: DType) -> int | None:
    """Bits per element of a type that is stored packed (``uint4`` -> 4), None of a type of whole bytes."""
    return _PACKED_BITS.get(dtype)


def operations(block: Block) -> Iterator[Operation]:
    """Every operation of a block in order, those of nested blocks after the operation that holds them."""
    for operation in block.operations:
        yield operation
        for nested in operation.blocks:
            yield from operations(nested)
