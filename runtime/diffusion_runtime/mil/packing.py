"""Elements of 1, 2, 3, 4 or 6 bits, packed without gaps from the lowest bit of the first byte on."""

from __future__ import annotations

import numpy as np

_BLOCK = 1 << 20  # elements; a multiple of 8, so that each block starts at a whole byte


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` elements take."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Flatten and pack the low ``bits`` bits of each element; the unused high bits of the last byte are 0.

    Raises ValueError where an element does not fit (signed elements of ``bits`` bits are in two's complement).
    """
    flat = np.ravel(values)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if flat.dtype.kind == "i" else (0, 1 << bits)
    if flat.size and not (low <= flat.min() and flat.max() < high):
        raise ValueError(f"elements from {flat.min()} to {flat.max()} do not fit in {bits} bits")
    packed = np.empty(packed_size(flat.size, bits), np.uint8)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        octets = np.zeros((-(-block.size // 8), 8), np.uint8)
        octets.reshape(-1)[: block.size] = block.astype(np.uint8) & ((1 << bits) - 1)
        words = np.zeros(len(octets), "<u8")
        for position in range(8):
            words |= octets[:, position].astype("<u8") << np.uint64(bits * position)
        data = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
        begin = start // 8 * bits
        packed[begin : begin + packed_size(block.size, bits)] = data[: packed_size(block.size, bits)]
    return packed


def unpack(packed: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """The ``count`` elements of ``packed`` (uint8) as uint8, or as int8 where they are ``signed``.

    Raises ValueError where ``packed`` is too short.
    """
    if packed.size < packed_size(count, bits):
        raise ValueError(
            f"{count} elements of {bits} bits need {packed_size(count, bits)} bytes, got {packed.size}"
        )
    values = np.empty(count, np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        begin = start // 8 * bits
        words = np.zeros((-(-size // 8), 8), np.uint8)
        octets = np.zeros(len(words) * bits, np.uint8)
        octets[: packed_size(size, bits)] = packed[begin : begin + packed_size(size, bits)]
        words[:, :bits] = octets.reshape(-1, bits)
        whole = words.view("<u8").reshape(-1)
        block = np.empty((len(words), 8), np.uint8)
        for position in range(8):
            block[:, position] = (whole >> np.uint64(bits * position)) & mask
        values[start : start + size] = block.reshape(-1)[:size]
    if signed:
        shift = 8 - bits
        return (values << shift).view(np.int8) >> shift
    return values
