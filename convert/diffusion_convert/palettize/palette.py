"""A weight as indices into a short table of values (a palette), with the least squared error.

float16 has 65,536 values, so that a histogram of bit patterns replaces sorting the weight: the cost hardly depends
on the weight's size. float32 weights are binned by their rounding to float16 (scaled by a power of two, to use all
of float16's range), each bin at the mean of its members: exact where no bin has two values; otherwise a bin, which
is 2⁻¹⁰ of its value wide at most, is not divided.

Entries are stored in the weight's own type. They are rounded from the exact optimum and then improved in turns
(nearest entry, rounded mean) while that lowers the error, which therefore never exceeds the rounded optimum's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_convert.palettize import kmeans
from diffusion_runtime.errors import InputError
from diffusion_runtime.mil.packing import pack, packed_size, unpack

_CHUNK = 1 << 18
_CACHED = 1 << 16
_PATTERNS = 1 << 16

_VALUES = np.arange(_PATTERNS, dtype=np.uint16).view(np.float16).astype(np.float64)
"""float16's values by their bits."""

_ASCENDING = np.concatenate([np.arange(0xFC00, 0x7FFF, -1), np.arange(0x7C01)])
"""The bits of float16's values from least to greatest, without NaN."""

TOGETHER = 4
"""Weights whose palettes are looked for together. More take little less time, and 5 MB more each."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Distinct finite values (ascending) and how often each occurs, float64; ``count`` entries of type ``dtype``
    are wanted."""

    values: np.ndarray
    counts: np.ndarray
    count: int
    dtype: np.dtype


Entries = Callable[[Sequence[Problem]], list[np.ndarray]]
"""`best_entries`, or what does nearly the same."""


@dataclass(frozen=True, slots=True)
class Palette:
    """``lut`` has 2 ** bits ascending entries in the weight's type (unused ones repeat the last), in groups as
    Core ML's operation takes it: (…, groups, …, 2 ** bits, 1). ``indices`` is uint8 in the weight's shape.
    ``squared_error`` is summed over all elements."""

    lut: np.ndarray
    indices: np.ndarray
    squared_error: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """A weight's name and type; its distinct finite values, ascending, how often each occurs; and which infinities
    occur."""

    name: str
    dtype: np.dtype
    values: np.ndarray
    counts: np.ndarray
    infinities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The entries of a palette, as `Palette` has them, and the values that they are for."""

    lut: np.ndarray
    histogram: Histogram


def palettize(weight: np.ndarray, bits: int, name: str = "weight") -> Palette:
    """The palette of ``2 ** bits`` entries with the least squared error, and the nearest entry to each element.

    Both zeros count as one value. Infinities keep entries of their own. Of two entries at equal distance the lower
    is taken. Raises InputError, naming the weight, for NaN, for other types than float16 and float32, and where
    infinities leave no entry for the finite values.
    """
    return _indexed(weight, tables([(histogram(weight, name), bits)])[0])


def _indexed(weight: np.ndarray, table: Table) -> Palette:
    indices = np.empty(weight.size, np.uint8)

    def put(start: int, chunk: np.ndarray) -> None:
        indices[start : start + chunk.size] = chunk

    noise = _nearest(weight, table, put)
    return Palette(table.lut, indices.reshape(weight.shape), noise)


def packed(weight: np.ndarray, bits: int, table: Table) -> tuple[np.ndarray, float]:
    """The indices of the nearest entries, packed as they are stored, and the squared error."""
    indices = np.empty(packed_size(weight.size, bits), np.uint8)

    def put(start: int, chunk: np.ndarray) -> None:
        begin = start // 8 * bits
        indices[begin : begin + packed_size(chunk.size, bits)] = chunk if bits == 8 else pack(chunk, bits)

    noise = _nearest(weight, table, put)
    return indices, noise


def histogram(weight: np.ndarray, name: str) -> Histogram:
    """Raises InputError as `palettize`."""
    if weight.dtype not in (np.float16, np.float32) or not weight.size:
        raise InputError(f"{name}: a weight of {weight.size} x {weight.dtype}; expected float16 or float32")
    return _half_histogram(weight, name) if weight.dtype == np.float16 else _single_histogram(weight, name)


def best_entries(problems: Sequence[Problem]) -> list[np.ndarray]:
    """Ascending entries with the least squared error, up to their rounding; no more than there are values."""
    return _entries(problems, kmeans.cluster([(one.values, one.counts, one.count) for one in problems]))


def _near_entries(problems: Sequence[Problem]) -> list[np.ndarray]:
    return _entries(problems, kmeans.nearly([(one.values, one.counts, one.count) for one in problems]))


def _entries(problems: Sequence[Problem], boundaries: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [
        _refined(one.values, one.counts, kmeans.centroids(one.values, one.counts, bounds), one.dtype)
        for one, bounds in zip(problems, boundaries, strict=True)
    ]


def tables(parts: Sequence[tuple[Histogram, int]], find: Entries = best_entries) -> list[Table]:
    """The tables of `palettize` for weights or groups of their channels, each with the bits of its indices, all
    together: a few at a time take less than one by one (`kmeans`). Or those of what else ``find`` finds."""
    for one, bits in parts:
        if len(one.values) and _room(one, bits) < 1:
            raise InputError(
                f"{one.name}: holds both infinities and finite values, for which {bits} bit has no room"
            )
    finite = [
        Problem(one.values, one.counts, _room(one, bits), one.dtype) for one, bits in parts if len(one.values)
    ]
    found = iter(find(finite))
    made = []
    for one, bits in parts:
        lut = np.array(one.infinities, one.dtype)
        if len(one.values):
            lut = np.concatenate([lut[lut < 0], next(found), lut[lut > 0]])
        made.append(Table(np.concatenate([lut, np.repeat(lut[-1:], (1 << bits) - len(lut))]), one))
    return made


def squared_errors(parts: Sequence[tuple[np.ndarray, str]], widths: Sequence[int]) -> list[dict[int, float]]:
    """For each weight, given with its name, close above what `palettize` gives at each of ``widths``: its palettes
    are the best ones, these nearly so. Each weight is read once, and one of float16 is not indexed."""
    errors = []
    for start in range(0, len(parts), TOGETHER):
        taken = parts[start : start + TOGETHER]
        counted = [histogram(weight, name) for weight, name in taken]
        made = iter(tables([(one, bits) for one in counted for bits in widths], _near_entries))
        errors += [{bits: _noise(weight, next(made)) for bits in widths} for weight, _ in taken]
    return errors


def _room(one: Histogram, bits: int) -> int:
    """The entries of ``bits`` that infinities leave."""
    return (1 << bits) - len(one.infinities)


def _noise(weight: np.ndarray, table: Table) -> float:
    """The squared error of all elements. float16's distinct values are all in the histogram."""
    if weight.dtype == np.float16:
        return _squared_error(table.histogram.values, table.histogram.counts, table.lut.astype(np.float64))
    return _nearest(weight, table, lambda _start, _chunk: None)


def palettize_groups(weight: np.ndarray, bits: int, axis: int, group_size: int, name: str = "weight") -> Palette:
    """One palette for each ``group_size`` channels along ``axis``. Raises InputError as `palettize`, and where the
    number of channels is not a multiple of ``group_size``."""
    parts = group_slices(weight.shape, axis, group_size, name)
    luts = np.empty((len(parts), 1 << bits), weight.dtype)
    indices = np.empty(weight.shape, np.uint8)
    noise = 0.0
    for start in range(0, len(parts), TOGETHER):
        taken = [np.ascontiguousarray(weight[part]) for part in parts[start : start + TOGETHER]]
        made = tables([(histogram(one, name), bits) for one in taken])
        for group, (one, table) in enumerate(zip(taken, made, strict=True), start):
            palette = _indexed(one, table)
            luts[group], indices[parts[group]] = palette.lut, palette.indices
            noise += palette.squared_error
    shape = [1] * weight.ndim
    shape[axis] = len(parts)
    return Palette(luts.reshape(*shape, 1 << bits, 1), indices, noise)


def group_slices(shape: Sequence[int], axis: int, group_size: int, name: str) -> list[tuple[slice, ...]]:
    """Where each ``group_size`` channels along ``axis`` lie. Raises InputError where those do not divide them."""
    channels = shape[axis]
    if channels % group_size:
        raise InputError(f"{name}: {channels} channels are not a multiple of the group size {group_size}")
    leading = (slice(None),) * axis
    return [(*leading, slice(start, start + group_size)) for start in range(0, channels, group_size)]


def decode(lut: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Entries by index: one table (rank 1), or tables in blocks as in `Palette`."""
    if lut.ndim == 1:
        plain: np.ndarray = lut[indices]
        return plain
    blocks = lut.shape[: indices.ndim]
    size = lut.shape[-2]
    first = np.arange(math.prod(blocks)).reshape(blocks) * size
    for axis, count in enumerate(blocks):
        if count > 1:
            first = np.repeat(first, indices.shape[axis] // count, axis=axis)
    decoded: np.ndarray = lut.reshape(-1)[first + indices]
    return decoded


def energies(original: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """The sums of squares of ``original`` and of the difference.

    Elements that are equal, infinities among them, add nothing to the second; infinities add nothing to the first.
    """
    signal = noise = 0.0
    for one, other in zip(_chunks(original, _CACHED), _chunks(decoded, _CACHED), strict=True):
        exact = _widened(one)
        with np.errstate(invalid="ignore", over="ignore"):
            error = exact - other
            energy, difference = float(np.dot(exact, exact)), float(np.dot(error, error))
        if not math.isfinite(energy + difference):
            exact = one.astype(np.float64)
            with np.errstate(invalid="ignore"):
                error = np.where(one == other, 0, exact - other)
            exact = np.where(np.isfinite(exact), exact, 0)
            energy, difference = float(np.dot(exact, exact)), float(np.dot(error, error))
        signal += energy
        noise += difference
    return signal, noise


def _widened(array: np.ndarray) -> np.ndarray:
    """As float32, but float16's infinities as 65536. The bits are moved to their places, and a product gives the
    exponent its other bias: a fourth of what numpy's conversion of float16 takes."""
    if array.dtype != np.float16:
        return array.astype(np.float32)
    bits = array.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= ~0x70000000  # of the sixteen bits' sign, which is the upper half's now, one is the sign
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


def stored_energies(original: np.ndarray, lut: np.ndarray, indices: np.ndarray, bits: int) -> tuple[float, float]:
    """`energies` of what packed ``indices`` into ``lut`` stand for; of one table, decoded a little at a time, two
    elements in one look-up."""
    if lut.size > 1 << bits:
        return energies(original, decode(lut, unpacked(indices, bits, 0, original.size).reshape(original.shape)))
    lut = lut.reshape(-1)
    pairs = np.zeros((len(lut), 256, 2), np.float32)  # by the second index and the first
    pairs[:, : len(lut), 0], pairs[..., 1] = lut, lut[:, None]
    table = pairs.reshape(-1).view(np.complex64)
    signal = noise = 0.0
    for start, one in enumerate(_chunks(original)):
        index = np.zeros(one.size + one.size % 2, np.uint8)
        index[: one.size] = unpacked(indices, bits, start * _CHUNK, one.size)
        decoded = np.take(table, index.view("<u2"), mode="clip").view(np.float32)  # "raise" would copy first
        energy, difference = energies(one, decoded[: one.size])
        signal, noise = signal + energy, noise + difference
    return signal, noise


def unpacked(indices: np.ndarray, bits: int, start: int, count: int) -> np.ndarray:
    """``count`` of packed ``indices`` from ``start`` on, a multiple of 8."""
    if bits == 8:
        return indices[start : start + count]
    return unpack(indices[start // 8 * bits :], bits, count)


def snr_db(signal: float, noise: float) -> float:
    """Signal-to-noise ratio of two energies in decibels; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _chunks(array: np.ndarray, size: int = _CHUNK) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, size):
        yield flat[start : start + size]


def _half_histogram(weight: np.ndarray, name: str) -> Histogram:
    counts = np.zeros(_PATTERNS, np.int64)
    for chunk in _chunks(weight.view(np.uint16)):
        counts += np.bincount(chunk, minlength=_PATTERNS)
    return _histogram(name, weight.dtype, counts, _VALUES)


def _single_histogram(weight: np.ndarray, name: str) -> Histogram:
    scale = _scale(weight)
    counts = np.zeros(_PATTERNS, np.int64)
    totals = np.zeros(_PATTERNS)
    for chunk in _chunks(weight):
        with np.errstate(over="ignore", invalid="ignore"):
            bins = (chunk.astype(np.float64) * scale).astype(np.float16).view(np.uint16)
        counts += np.bincount(bins, minlength=_PATTERNS)
        totals += np.bincount(bins, weights=np.where(np.isfinite(chunk), chunk, 0), minlength=_PATTERNS)
    means = np.where(np.isfinite(_VALUES), totals / np.maximum(counts, 1), _VALUES)
    return _histogram(name, weight.dtype, counts, means)


def _scale(weight: np.ndarray) -> float:
    """The power of two that brings the largest finite magnitude into 2¹⁴ … 2¹⁵."""
    largest = max(float(np.max(np.abs(chunk), where=np.isfinite(chunk), initial=0)) for chunk in _chunks(weight))
    return 2.0 ** (15 - math.frexp(largest)[1]) if largest else 1.0


def _histogram(name: str, dtype: np.dtype, counts: np.ndarray, values: np.ndarray) -> Histogram:
    """Of elements counted by pattern; ``values`` is what each pattern stands for, and ascends as float16 does."""
    if invalid := int(counts.sum() - counts[_ASCENDING].sum()):
        raise InputError(f"{name}: {invalid} elements are NaN; a palette cannot hold them")
    used = _ASCENDING[counts[_ASCENDING] > 0]
    infinite = np.isinf(values[used])
    finite = used[~infinite]
    first = np.flatnonzero(np.diff(values[finite], prepend=-np.inf))  # zero has two patterns
    weights = np.add.reduceat(counts[finite], first).astype(np.float64)
    return Histogram(name, dtype, values[finite[first]], weights, tuple(values[used[infinite]].tolist()))


def _refined(values: np.ndarray, counts: np.ndarray, means: np.ndarray, dtype: np.dtype) -> np.ndarray:
    lut, lowest = means.astype(dtype), math.inf
    candidate = lut
    while True:
        entries = candidate.astype(np.float64)
        error = _squared_error(values, counts, entries)
        if not error < lowest:
            return lut
        lut, lowest = candidate, error
        chosen = _index(entries, values)
        sizes = np.bincount(chosen, weights=counts, minlength=len(lut))
        sums = np.bincount(chosen, weights=counts * values, minlength=len(lut))
        candidate = np.where(sizes > 0, sums / np.maximum(sizes, 1), entries).astype(dtype)


def _squared_error(values: np.ndarray, counts: np.ndarray, entries: np.ndarray) -> float:
    return float(np.sum(counts * (values - entries[_index(entries, values)]) ** 2))


def _index(entries: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The nearest of ascending ``entries`` (float64) to each value; of two at equal distance the lower."""
    with np.errstate(invalid="ignore"):
        middles = (entries[1:] + entries[:-1]) / 2
    # Next to an infinity: everything finite is nearer to the finite entry; between equal infinities: either.
    middles = np.where(np.isnan(middles), entries[1:], middles)
    middles = np.where(np.isneginf(middles), -_BEYOND, np.where(np.isposinf(middles), _BEYOND, middles))
    return np.searchsorted(middles, values, side="left")


_BEYOND = 1e300  # beyond every finite float32


def _nearest(weight: np.ndarray, table: Table, put: Callable[[int, np.ndarray], None]) -> float:
    """Calls ``put`` with the nearest entries' indices, a little at a time: where those begin, and they. Returns the
    squared error."""
    entries = table.lut.astype(np.float64)
    noise = 0.0
    if weight.dtype == np.float16:
        by_pattern, space = _index(entries, _VALUES).astype(np.uint8), np.empty(_CHUNK, np.uint8)
        for number, chunk in enumerate(_chunks(weight.view(np.uint16))):
            # No pattern is out of range; "raise" copies first.
            put(number * _CHUNK, np.take(by_pattern, chunk, out=space[: chunk.size], mode="clip"))
        return _noise(weight, table)
    for number, chunk in enumerate(_chunks(weight)):
        indices = _index(entries, chunk.astype(np.float64)).astype(np.uint8)
        put(number * _CHUNK, indices)
        noise += energies(chunk, table.lut[indices])[1]
    return noise
