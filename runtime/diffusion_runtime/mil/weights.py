"""Core ML's weight files (MIL blob storage, version 2): read where they lie, written in one pass.

A file is a 64-byte header (u32 count, u32 version = 2) and, for each blob, a 64-byte record at a multiple of 64
(u32 0xDEADBEEF, u32 type, u64 size in bytes, u64 offset of the data, u64 unused bits of the last byte) followed by
its data, which starts at a multiple of 64 as well. Numbers are little-endian. ``Blob.offset`` is the record's.
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Self

import numpy as np

from diffusion_runtime.errors import PackageError
from diffusion_runtime.mil.packing import pack, packed_size, unpack
from diffusion_runtime.mil.program import DType, numpy_dtype, packed_bits

ALIGNMENT = 64
_VERSION = 2
_SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II56x")
_RECORD = struct.Struct("<IIQQQ32x")
_CODES = {
    DType.FLOAT16: 1,
    DType.FLOAT32: 2,
    DType.UINT8: 3,
    DType.INT8: 4,
    DType.INT16: 6,
    DType.UINT16: 7,
    DType.INT4: 8,
    DType.UINT1: 9,
    DType.UINT2: 10,
    DType.UINT4: 11,
    DType.UINT3: 12,
    DType.UINT6: 13,
    DType.INT32: 14,
    DType.UINT32: 15,
}


_AT_ONCE = 2**20
"""Bytes written by one call. Where it is many more, Linux looks for as much memory in one piece to hold them, which
takes more time than to write them."""


class WeightFile:
    """A mapped weight file. Opening reads the header alone; ``read`` returns views into the map, which is
    read-only: the system counts a writable one as memory of the process's own (RLIMIT_DATA).

    Raises PackageError where the file is missing, shorter than a header or not of this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for whoever writes to it
                raise PackageError(f"{path}: the weight file is not a regular file")
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise PackageError(f"{path}: the weight file cannot be read: {error}") from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        if self._bytes.size < _HEADER.size:
            raise PackageError(
                f"{path}: the weight file is truncated: {self._bytes.size} bytes, expected at least {_HEADER.size}"
            )
        self.count, version = _HEADER.unpack(self._bytes[: _HEADER.size].tobytes())
        self._found: set[int] = set()
        if version != _VERSION:
            raise PackageError(f"{path}: weight file format {version} at offset 4, expected {_VERSION}")

    @property
    def size_bytes(self) -> int:
        return self._bytes.size

    def read(self, offset: int, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
        """The blob at ``offset`` as an array of ``shape``.

        Elements of whole bytes stay in the map (no copy); packed ones are unpacked, one per uint8 or int8. Raises
        PackageError where no such blob lies there: wrong place, type or size, or beyond the end of the file.
        """
        data = self._data(offset, dtype, math.prod(shape))
        bits = packed_bits(dtype)
        if bits is None:
            return data.view(numpy_dtype(dtype)).reshape(shape)
        return unpack(data, bits, math.prod(shape), signed=dtype is DType.INT4).reshape(shape)

    def packed(self, offset: int, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
        """The same blob's own bytes (uint8, in the map), still packed. Raises as ``read``: a cheap check."""
        return self._data(offset, dtype, math.prod(shape))

    def release(self) -> None:
        """Let go of the pages that were read; they are read anew where needed. Nothing where the OS cannot."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _data(self, offset: int, dtype: DType, count: int) -> np.ndarray:
        where = f"{self.path}: blob at offset {offset}"
        total = self._bytes.size
        if offset % ALIGNMENT or not _HEADER.size <= offset <= total - _RECORD.size:
            raise PackageError(f"{where}: expected a multiple of 64 from 64 to {total - _RECORD.size}")
        record = self._bytes[offset : offset + _RECORD.size].tobytes()
        sentinel, code, size, start, unused_bits = _RECORD.unpack(record)
        if sentinel != _SENTINEL:
            raise PackageError(f"{where}: no blob begins here: got mark {sentinel:#x}, expected {_SENTINEL:#x}")
        if code != _CODES.get(dtype):
            stored = next((known.value for known, number in _CODES.items() if number == code), f"type {code}")
            raise PackageError(f"{where}: holds {stored}, expected {dtype.value}")
        bits = packed_bits(dtype)
        expected = packed_size(count, bits) if bits else count * numpy_dtype(dtype).itemsize
        if size != expected or (bits and unused_bits != expected * 8 - count * bits):
            raise PackageError(f"{where}: holds {size} bytes, expected {expected} for {count} x {dtype.value}")
        if start % ALIGNMENT or start < offset + _RECORD.size or start + size > total:
            raise PackageError(
                f"{where}: data from {start} to {start + size} lies outside the truncated file of {total} bytes"
            )
        self._found.add(offset)
        if len(self._found) > self.count:
            raise PackageError(f"{where}: is one more than the {self.count} blobs that the file says it holds")
        return self._bytes[start : start + size]


class WeightWriter:
    """Writes a weight file in one pass, byte for byte as coremltools does; a context manager.

    Data go to ``path`` at once: write to a temporary sibling and rename. Nothing but the current chunk is held.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._file.write(_HEADER.pack(0, _VERSION))
        self.count = 0

    def add(self, data: np.ndarray | Iterable[np.ndarray], dtype: DType, packed: int | None = None) -> int:
        """Append one blob, given whole or in chunks, and return the offset for its ``Blob``.

        Arrays must have ``numpy_dtype(dtype)``; packed types are given one element per uint8 (int4: int8), or
        ``packed`` elements as bytes that `pack` made. Raises ValueError for another dtype, an element that does
        not fit, or another number of bytes.
        """
        if dtype not in _CODES:
            raise ValueError(f"{dtype.value} cannot be stored in a weight file")
        offset = self._pad()
        # Room for the record, which says how long the data are: that is known when they have been written.
        self._file.write(bytes(_RECORD.size))
        chunks = [data] if isinstance(data, np.ndarray) else data
        given = dtype if packed is None else DType.UINT8
        bits, to_pack = packed_bits(dtype), packed_bits(given)
        size = elements = 0
        # Packed elements of two chunks may share a byte.
        for chunk in _whole_octets(chunks, dtype) if to_pack else chunks:
            _check_dtype(chunk, given)
            elements += chunk.size
            size += self._write(_bytes_of(pack(chunk, to_pack) if to_pack else chunk))
        unused_bits = size * 8 - (elements if packed is None else packed) * bits if bits else 0
        if not 0 <= unused_bits < 8:
            raise ValueError(f"{size} bytes are not those of {packed} x {dtype.value}")
        end = self._file.tell()
        self._file.seek(offset)
        self._file.write(_RECORD.pack(_SENTINEL, _CODES[dtype], size, offset + _RECORD.size, unused_bits))
        self._file.seek(end)
        self.count += 1
        return offset

    def close(self) -> None:
        """Write the count of blobs into the header and close the file."""
        if not self._file.closed:
            self._file.seek(0)
            self._file.write(_HEADER.pack(self.count, _VERSION))
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: memoryview) -> int:
        return sum(self._file.write(data[at : at + _AT_ONCE]) for at in range(0, len(data), _AT_ONCE))

    def _pad(self) -> int:
        position = self._file.tell()
        padding = -position % ALIGNMENT
        self._file.write(bytes(padding))
        return position + padding


def _check_dtype(chunk: np.ndarray, dtype: DType) -> None:
    if chunk.dtype != numpy_dtype(dtype):
        raise ValueError(f"got an array of {chunk.dtype}, expected {numpy_dtype(dtype)} for {dtype.value}")


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _whole_octets(chunks: Iterable[np.ndarray], dtype: DType) -> Iterator[np.ndarray]:
    """Chunks regrouped to multiples of eight elements, which fill whole bytes at any width; the last may be odd."""
    rest = np.empty(0, numpy_dtype(dtype))
    for chunk in chunks:
        _check_dtype(chunk, dtype)
        flat = np.concatenate([rest, chunk.reshape(-1)]) if rest.size else chunk.reshape(-1)
        whole = flat.size // 8 * 8
        rest = flat[whole:]
        if whole:
            yield flat[:whole]
    if rest.size:
        yield rest
