"""Elements of 1, 2, 3, 4 or 6 bits, packed without gaps from the lowest bit of the first byte on.

Eight elements of a byte each are one 64-bit word. Neighbours in it are joined three times (bytes in pairs, pairs in
fours, fours in eight), for all words at once; unpacking parts them in the other order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BLOCK = 1 << 18  # elements; a multiple of 8, so that each block starts at a whole byte; stays in the cache
_THREADS = 4


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` elements take."""
    return (count * bits + 7) // 8


def _require(packed: np.ndarray, bits: int, count: int) -> None:
    if packed.size < packed_size(count, bits):
        raise ValueError(
            f"{count} elements of {bits} bits need {packed_size(count, bits)} bytes, got {packed.size}"
        )


def _joints(bits: int) -> Iterator[tuple[np.uint64, np.uint64, np.uint64]]:
    """For each joining: which bits of a word are the lower neighbours', how far down the upper ones move, and
    which bits are theirs then."""
    for pairs in (4, 2, 1):
        width, room = bits * 4 // pairs, 32 // pairs
        lower = sum((1 << width) - 1 << 2 * room * pair for pair in range(pairs))
        yield np.uint64(lower), np.uint64(room - width), np.uint64(lower << width)


def _copy(source: np.ndarray, source_step: int, target: np.ndarray, target_step: int, bits: int) -> None:
    """The first ``bits`` bytes of every ``source_step`` to every ``target_step``. Whole items of an odd size would
    take numpy three times as long."""
    size = bits & -bits
    items = source.view(f"u{size}").reshape(-1, source_step // size)
    places = target.view(f"u{size}").reshape(-1, target_step // size)
    for number in range(bits // size):
        places[:, number] = items[:, number]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Flatten and pack the low ``bits`` bits of each element; the unused high bits of the last byte are 0.

    Raises ValueError where an element does not fit (signed elements of ``bits`` bits are in two's complement).
    """
    flat = np.ravel(values)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if flat.dtype.kind == "i" else (0, 1 << bits)
    if flat.size and not (low <= flat.min() and flat.max() < high):
        raise ValueError(f"elements from {flat.min()} to {flat.max()} do not fit in {bits} bits")
    packed = np.empty(-(-flat.size // 8) * bits, np.uint8)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        words = np.zeros(-(-block.size // 8), "<u8")
        words.view(np.uint8)[: block.size] = block.astype(np.uint8, copy=False) & ((1 << bits) - 1)
        for lower, distance, upper in _joints(bits):
            moved = words >> distance
            moved &= upper
            words &= lower
            words |= moved
        begin = start // 8 * bits
        _copy(words, 8, packed[begin : begin + len(words) * bits], bits, bits)
    return packed[: packed_size(flat.size, bits)]


def unpack(packed: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """The ``count`` elements of ``packed`` (uint8) as uint8, or as int8 where they are ``signed``.

    Raises ValueError where ``packed`` is too short.
    """
    _require(packed, bits, count)
    values = np.empty(count, np.uint8)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        words = np.zeros(-(-size // 8), "<u8")
        begin = start // 8 * bits
        data = packed[begin : begin + len(words) * bits]
        whole = len(data) // bits
        _copy(data[: whole * bits], bits, words[:whole], 8, bits)
        words.view(np.uint8)[whole * 8 : whole * 8 + len(data) % bits] = data[whole * bits :]
        for lower, distance, upper in reversed(tuple(_joints(bits))):
            moved = words & upper
            moved <<= distance
            words &= lower
            words |= moved
        values[start : start + size] = words.view(np.uint8)[:size]
    if signed:
        shift = 8 - bits
        return (values << shift).view(np.int8) >> shift
    return values


def look_up_packed(packed: np.ndarray, table: np.ndarray, bits: int, count: int) -> np.ndarray:
    """``table[unpack(packed, bits, count)]``, several neighbours at a time: what lies in one byte, or in one and a
    half, is found at once in a table of all that may lie there; blocks of many by several threads, which numpy
    lets run side by side.

    Raises ValueError where ``packed`` is too short.
    """
    _require(packed, bits, count)
    packed, table = packed.reshape(-1).view(np.uint8), table.reshape(-1)
    together = (12 if bits % 3 == 0 else 8) // bits
    every = np.arange(1 << bits * together)
    rows = np.stack([table[every >> bits * place & (1 << bits) - 1] for place in range(together)], axis=1)
    words = rows.view(f"V{rows.itemsize * together}").reshape(-1)
    values = np.empty(-(-count // 8) * 8 // together, words.dtype)

    def fill(start: int) -> None:
        size = min(_BLOCK, count - start)
        data = packed[start * bits // 8 : start * bits // 8 + packed_size(size, bits)]
        data = np.pad(data, (0, -data.size % bits)) if data.size % bits else data
        places = data if bits * together == 8 else _by_twelve(data)
        first = start // together
        words.take(places, out=values[first : first + places.size], mode="clip")

    starts, threads = range(0, count, _BLOCK), min(_THREADS, os.cpu_count() or 1)
    if threads > 1 and len(starts) > 2 * threads:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, starts))
    else:
        for start in starts:
            fill(start)
    return values.view(rows.dtype)[:count]


def _by_twelve(data: np.ndarray) -> np.ndarray:
    """The numbers of 12 bits in ``data``, a multiple of three bytes."""
    first, second, third = (data[place::3].astype(np.intp) for place in range(3))
    found = np.empty((first.size, 2), np.intp)
    np.bitwise_or(first, (second & 15) << 8, out=found[:, 0])
    np.bitwise_or(second >> 4, third << 4, out=found[:, 1])
    return found.reshape(-1)
