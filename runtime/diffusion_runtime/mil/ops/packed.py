"""Compressed weights: arrays as stored in, the dense array in its own element type out.

The two generations of ops share names. Those of iOS 16 carry packed bytes and a ``shape``, those of iOS 18 carry
elements of sub-byte types, which arrive unpacked. Values equal those of coremltools' decompression, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from diffusion_runtime.errors import PackageError, UnsupportedError
from diffusion_runtime.families import PALETTE_BITS
from diffusion_runtime.mil.ops.registry import mil_op
from diffusion_runtime.mil.packing import look_up_packed, packed_size, unpack

_LONGEST_VECTOR = 64  # of palettes of vectors: a small file with longer ones would unfold to gigabytes


@mil_op("constexpr_cast")
def constexpr_cast(source_val: np.ndarray, output_dtype: Literal["fp32"]) -> np.ndarray:
    return source_val.astype(np.float32)


@mil_op("constexpr_affine_dequantize")
def constexpr_affine_dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: int
) -> np.ndarray:
    """scale * (quantized_data - zero_point), a vector of either along ``axis``, computed in float32."""
    shifted = quantized_data.astype(np.float32)
    shifted -= _along(zero_point, quantized_data, axis).astype(np.float32)
    shifted *= _along(scale, quantized_data, axis)
    return shifted.astype(scale.dtype)


@mil_op("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(
    data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    """scale * (data - offset); each number of ``scale`` and ``offset`` stands for a block of ``data``."""
    values: np.ndarray = data.astype(scale.dtype)
    if offset is not None:
        values = values - _blocks(offset, data.shape)
    values *= _blocks(scale, data.shape)
    return values


@mil_op("constexpr_lut_to_dense")
def constexpr_lut_to_dense(
    indices: np.ndarray,
    lut: np.ndarray,
    shape: Sequence[int] | None = None,
    vector_axis: int | None = None,
) -> np.ndarray:
    """iOS 16: ``indices`` are packed bytes, ``shape`` is given. iOS 18: ``lut`` is (*groups, entries, vector)."""
    if shape is None:
        return _look_up(indices, lut, vector_axis)
    bits = _bits(lut.size)
    count = math.prod(shape)
    if indices.size != packed_size(count, bits):
        raise PackageError(
            f"constexpr_lut_to_dense: {indices.size} bytes of indices, expected {packed_size(count, bits)}"
        )
    return look_up_packed(indices, lut, bits, count).reshape(tuple(shape))


@mil_op("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(
    nonzero_data: np.ndarray, mask: np.ndarray, shape: Sequence[int] | None = None
) -> np.ndarray:
    """Zero but where ``mask`` has a bit; iOS 16: ``mask`` is packed and ``shape`` is given."""
    if shape is not None:
        mask = unpack(mask, 1, math.prod(shape)).reshape(tuple(shape))
    _check_mask("constexpr_sparse_to_dense", mask, nonzero_data)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@mil_op("constexpr_lut_to_sparse")
def constexpr_lut_to_sparse(
    indices_mask: np.ndarray, indices_nonzero_data: np.ndarray, lut: np.ndarray, vector_axis: int | None = None
) -> tuple[np.ndarray, ...]:
    """Mask and non-zero data after looking up the non-zero indices."""
    _check_mask("constexpr_lut_to_sparse", indices_mask, indices_nonzero_data)
    indices = np.zeros(indices_mask.shape, indices_nonzero_data.dtype)
    indices[indices_mask != 0] = indices_nonzero_data
    dense = _look_up(indices, lut, vector_axis)
    mask = indices_mask if vector_axis is None else indices_mask.repeat(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


@mil_op("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: np.ndarray, nonzero_data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Mask and non-zero data after shifting and scaling the non-zero data."""
    dense = constexpr_sparse_to_dense(nonzero_data, data_mask)
    return data_mask, constexpr_blockwise_shift_scale(dense, scale, offset)[data_mask != 0]


def _look_up(indices: np.ndarray, lut: np.ndarray, vector_axis: int | None) -> np.ndarray:
    """Each index replaced by its entry (a vector, laid along ``vector_axis``) in the table of its group."""
    entries, vector = lut.shape[-2:]
    rank = indices.ndim
    if lut.ndim != rank + 2 or any(size % groups for size, groups in zip(indices.shape, lut.shape, strict=False)):
        raise PackageError(
            f"constexpr_lut_to_dense: tables of shape {lut.shape} for indices of shape {indices.shape}"
        )
    if vector > 1 and vector_axis is None:
        raise PackageError(f"constexpr_lut_to_dense: vectors of {vector} elements without vector_axis")
    if indices.size and int(indices.max()) >= entries:
        raise PackageError(f"constexpr_lut_to_dense: index {int(indices.max())} in a table of {entries}")
    if vector > _LONGEST_VECTOR:
        raise UnsupportedError(f"constexpr_lut_to_dense: vectors of {vector} elements; known: to {_LONGEST_VECTOR}")
    groups = lut.shape[:rank]
    dense = np.empty((*indices.shape, vector), lut.dtype)
    for group in np.ndindex(*groups):
        block = tuple(
            slice(place * size // count, (place + 1) * size // count)
            for place, size, count in zip(group, indices.shape, groups, strict=True)
        )
        dense[block] = lut[group][indices[block]]
    if vector == 1:
        return dense[..., 0]
    axis = int(vector_axis or 0) % rank
    merged = [size * vector if place == axis else size for place, size in enumerate(indices.shape)]
    return np.moveaxis(dense, -1, axis + 1).reshape(merged)


def _bits(entries: int) -> int:
    bits = max(entries - 1, 0).bit_length()
    if bits not in PALETTE_BITS or 1 << bits != entries:
        raise UnsupportedError(
            f"constexpr_lut_to_dense: a table of {entries} entries is not covered; known: 2, 4, 8, 16, 64, 256"
        )
    return bits


def _blocks(parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if parameter.ndim != len(shape) or any(
        size % count for size, count in zip(shape, parameter.shape, strict=True)
    ):
        raise PackageError(f"constexpr_blockwise_shift_scale: a parameter of shape {parameter.shape} for {shape}")
    for axis, (size, count) in enumerate(zip(shape, parameter.shape, strict=True)):
        if 1 < count < size:
            parameter = parameter.repeat(size // count, axis)
    return parameter


def _along(parameter: np.ndarray, data: np.ndarray, axis: int) -> np.ndarray:
    if parameter.ndim == 0:
        return parameter
    shape = [1] * data.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def _check_mask(op: str, mask: np.ndarray, data: np.ndarray) -> None:
    if int(np.count_nonzero(mask)) != data.size:
        raise PackageError(f"{op}: {data.size} values for a mask of {int(np.count_nonzero(mask))} set bits")
