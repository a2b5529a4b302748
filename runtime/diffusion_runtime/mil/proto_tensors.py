"""The elements of literals: `MIL_pb2.TensorValue` <-> arrays, packed as protobuf has them or listed one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffusion_runtime.errors import PackageError
from diffusion_runtime.mil.packing import pack, packed_size, unpack
from diffusion_runtime.mil.program import DType, TensorType, numpy_dtype, packed_bits

_LISTED = {  # the field of TensorValue; every other type is written as bytes
    DType.BOOL: "bools",
    DType.STRING: "strings",
    DType.FLOAT32: "floats",
    DType.FLOAT64: "doubles",
    DType.INT16: "ints",
    DType.UINT16: "ints",
    DType.INT32: "ints",
    DType.INT64: "longInts",
    DType.UINT64: "longInts",
}


def tensor_from_proto(spec: Any, kind: TensorType) -> np.ndarray | str:
    """The literal's array, or its text. Raises PackageError for one that is not whole."""
    if any(size is None or size < 0 for size in kind.shape):
        raise PackageError(f"a literal of shape {kind.shape}, expected fixed sizes")
    shape = tuple(size for size in kind.shape if size is not None)
    count = math.prod(shape)
    field = spec.WhichOneof("value")
    if field is None:
        raise PackageError(f"a literal of {kind.dtype.value} without a value")
    elements = getattr(spec, field).values
    if (
        kind.dtype is DType.STRING and not shape and field == "strings" and len(elements) == 1
    ):  # each operation's name
        return str(elements[0])
    try:
        flat = _unpacked(elements, kind.dtype, count) if field == "bytes" else _listed(list(elements), kind.dtype)
    except (ValueError, OverflowError) as error:
        raise PackageError(f"a literal of {kind.dtype.value} from {field}: {error}") from error
    if flat.size != count:
        raise PackageError(f"a literal of {flat.size} elements, expected {count} for shape {shape}")
    if kind.dtype is DType.STRING and not shape:
        return str(flat[0])
    return flat.reshape(shape)


def _unpacked(data: bytes, dtype: DType, count: int) -> np.ndarray:
    if dtype is DType.STRING:
        raise ValueError("expected strings")
    bits = packed_bits(dtype)
    if bits is None:
        return np.frombuffer(data, numpy_dtype(dtype))
    if len(data) != packed_size(count, bits):
        raise ValueError(f"{len(data)} bytes, expected {packed_size(count, bits)}")
    return unpack(np.frombuffer(data, np.uint8), bits, count, signed=dtype is DType.INT4)


def _listed(elements: list[Any], dtype: DType) -> np.ndarray:
    wanted = numpy_dtype(dtype)
    if dtype is DType.STRING or any(isinstance(element, str) for element in elements):
        if dtype is not DType.STRING or not all(isinstance(element, str) for element in elements):
            raise ValueError("strings where numbers are expected, or numbers where strings are")
        return np.array(elements, object)
    if dtype is DType.UINT64:  # protobuf lists them among signed integers, bit for bit
        return np.array(elements, np.int64).view(wanted)
    array = np.array(elements, wanted if wanted.kind == "f" else np.int64)
    narrow = array.astype(wanted)
    if wanted.kind in "iu" and not (narrow == array).all():
        raise ValueError("an element is out of range")
    return narrow


def fill_tensor(spec: Any, data: Any, dtype: DType) -> None:
    """Put an array or a text into ``spec``. Raises ValueError for another element type than ``dtype``."""
    array = np.asarray(data, object) if isinstance(data, str) else data
    if not isinstance(array, np.ndarray) or array.dtype != numpy_dtype(dtype):
        raise ValueError(f"a literal of {dtype.value} holds {getattr(array, 'dtype', type(array).__name__)}")
    bits = packed_bits(dtype)
    if dtype not in _LISTED:
        spec.bytes.values = (pack(array, bits) if bits else array).tobytes()
        return
    field = getattr(spec, _LISTED[dtype])
    field.SetInParent()  # of a literal without elements, protobuf would write no value
    field.values.extend((array.view(np.int64) if dtype is DType.UINT64 else array).ravel().tolist())
