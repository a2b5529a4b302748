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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_convert.palettize import kmeans
from diffusion_runtime.errors import InputError

_CHUNK = 1 << 20
_CACHED = 1 << 16
_PATTERNS = 1 << 16

_VALUES = np.arange(_PATTERNS, dtype=np.uint16).view(np.float16).astype(np.float64)
"""float16's values by their bits."""

_ASCENDING = np.concatenate([np.arange(0xFC00, 0x7FFF, -1), np.arange(0x7C01)])
"""The bits of float16's values from least to greatest, without NaN."""

TOGETHER = 4
"""Weights whose palettes are looked for together. More take little less time, and 5 MB more each."""

Cluster = Callable[[Sequence[kmeans.Problem]], list[np.ndarray]]
"""`kmeans.cluster`, or what does nearly the same."""


@dataclass(frozen=True, slots=True)
class Palette:
    """``lut`` has 2 ** bits ascending entries in the weight's type (unused ones repeat the last), in groups as
    Core ML's operation takes it: (…, groups, …, 2 ** bits, 1). ``indices`` is uint8 in the weight's shape.
    ``squared_error`` is summed over all elements."""

    lut: np.ndarray
    indices: np.ndarray
    squared_error: float


@dataclass(frozen=True, slots=True)
class _Histogram:
    """Distinct finite values, ascending, and how often each occurs; and which infinities occur."""

    values: np.ndarray
    counts: np.ndarray
    infinities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The entries of a palette, as `Palette` has them, and the values that they are for."""

    lut: np.ndarray
    histogram: _Histogram


Part = tuple[np.ndarray, int, str]
"""A weight or a group of its channels, the bits that its indices shall have, and the weight's name."""


def palettize(weight: np.ndarray, bits: int, name: str = "weight") -> Palette:
    """The palette of ``2 ** bits`` entries with the least squared error, and the nearest entry to each element.

    Both zeros count as one value. Infinities keep entries of their own. Of two entries at equal distance the lower
    is taken. Raises InputError, naming the weight, for NaN, for other types than float16 and float32, and where
    infinities leave no entry for the finite values.
    """
    return indexed(weight, tables([(weight, bits, name)])[0])


def tables(parts: Iterable[Part]) -> list[Table]:
    """The tables of `palettize`, of all parts together: a few at a time take less than one by one (`kmeans`)."""
    described = [(_read_histogram(weight, name), bits, weight.dtype, name) for weight, bits, name in parts]
    return _tables(described, kmeans.cluster)


def indexed(weight: np.ndarray, table: Table) -> Palette:
    """The nearest entry of its ``table`` to each element."""
    indices = _nearest(weight, table.lut)
    return Palette(table.lut, indices, _noise(weight, table, indices))


def squared_errors(parts: Sequence[tuple[np.ndarray, str]], widths: Sequence[int]) -> list[dict[int, float]]:
    """For each weight, given with its name, close above what `palettize` gives at each of ``widths``: its palettes
    are the best ones, these nearly so. Each weight is read once, and one of float16 is not indexed."""
    errors = []
    for start in range(0, len(parts), TOGETHER):
        taken = parts[start : start + TOGETHER]
        read = [(_read_histogram(weight, name), weight.dtype, name) for weight, name in taken]
        described = [(histogram, bits, dtype, name) for histogram, dtype, name in read for bits in widths]
        made = iter(_tables(described, kmeans.nearly))
        errors += [{bits: _noise(weight, next(made)) for bits in widths} for weight, _ in taken]
    return errors


def _read_histogram(weight: np.ndarray, name: str) -> _Histogram:
    if weight.dtype not in (np.float16, np.float32) or not weight.size:
        raise InputError(f"{name}: a weight of {weight.size} x {weight.dtype}; expected float16 or float32")
    return _half_histogram(weight, name) if weight.dtype == np.float16 else _single_histogram(weight, name)


def _tables(described: Sequence[tuple[_Histogram, int, np.dtype, str]], cluster: Cluster) -> list[Table]:
    """The ``2 ** bits`` entries of the best palette of each histogram, or of what else ``cluster`` finds."""
    for histogram, bits, _, name in described:
        if len(histogram.values) and _room(histogram, bits) < 1:
            raise InputError(f"{name}: holds both infinities and finite values, for which {bits} bit has no room")
    finite = [(one, _room(one, bits), dtype) for one, bits, dtype, _ in described if len(one.values)]
    clusters = iter(cluster([(one.values, one.counts, room) for one, room, _ in finite]))
    made = []
    for histogram, bits, dtype, _ in described:
        lut = np.array(histogram.infinities, dtype)
        if len(histogram.values):
            means = kmeans.centroids(histogram.values, histogram.counts, next(clusters))
            between = _refined(histogram.values, histogram.counts, means, dtype)
            lut = np.concatenate([lut[lut < 0], between, lut[lut > 0]])
        made.append(Table(np.concatenate([lut, np.repeat(lut[-1:], (1 << bits) - len(lut))]), histogram))
    return made


def _room(histogram: _Histogram, bits: int) -> int:
    """The entries of ``bits`` that infinities leave."""
    return (1 << bits) - len(histogram.infinities)


def _noise(weight: np.ndarray, table: Table, indices: np.ndarray | None = None) -> float:
    """The squared error of all elements. float16's distinct values are all in the histogram."""
    if weight.dtype == np.float16:
        return _squared_error(table.histogram.values, table.histogram.counts, table.lut.astype(np.float64))
    return energies(weight, table.lut[_nearest(weight, table.lut) if indices is None else indices])[1]


def palettize_groups(weight: np.ndarray, bits: int, axis: int, group_size: int, name: str = "weight") -> Palette:
    """One palette for each ``group_size`` channels along ``axis``. Raises InputError as `palettize`, and where the
    number of channels is not a multiple of ``group_size``."""
    parts = group_slices(weight.shape, axis, group_size, name)
    luts = np.empty((len(parts), 1 << bits), weight.dtype)
    indices = np.empty(weight.shape, np.uint8)
    noise = 0.0
    for start in range(0, len(parts), TOGETHER):
        taken = [np.ascontiguousarray(weight[part]) for part in parts[start : start + TOGETHER]]
        made = tables((one, bits, name) for one in taken)
        for group, (one, table) in enumerate(zip(taken, made, strict=True), start):
            palette = indexed(one, table)
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


def stored_energies(original: np.ndarray, lut: np.ndarray, indices: np.ndarray) -> tuple[float, float]:
    """`energies` of what ``indices`` into ``lut`` stand for; of one table, decoded a little at a time, two elements
    in one look-up."""
    if lut.ndim > 1:
        return energies(original, decode(lut, indices))
    pairs = np.zeros((len(lut), 256, 2), np.float32)  # by the second index and the first
    pairs[:, : len(lut), 0], pairs[..., 1] = lut, lut[:, None]
    table = pairs.reshape(-1).view(np.complex64)
    values, places = original.reshape(-1), indices.reshape(-1)
    even = values.size // 2 * 2
    signal, noise = energies(values[even:], lut[places[even:]])
    for one, index in zip(_chunks(values[:even], _CACHED), _chunks(places[:even], _CACHED), strict=True):
        decoded = np.take(table, index.view("<u2"), mode="clip").view(np.float32)  # "raise" would copy first
        energy, difference = energies(one, decoded)
        signal, noise = signal + energy, noise + difference
    return signal, noise


def snr_db(signal: float, noise: float) -> float:
    """Signal-to-noise ratio of two energies in decibels; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _chunks(array: np.ndarray, size: int = _CHUNK) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, size):
        yield flat[start : start + size]


def _half_histogram(weight: np.ndarray, name: str) -> _Histogram:
    counts = np.zeros(_PATTERNS, np.int64)
    for chunk in _chunks(weight.view(np.uint16)):
        counts += np.bincount(chunk, minlength=_PATTERNS)
    return _histogram(counts, _VALUES, name)


def _single_histogram(weight: np.ndarray, name: str) -> _Histogram:
    scale = _scale(weight)
    counts = np.zeros(_PATTERNS, np.int64)
    totals = np.zeros(_PATTERNS)
    for chunk in _chunks(weight):
        with np.errstate(over="ignore", invalid="ignore"):
            bins = (chunk.astype(np.float64) * scale).astype(np.float16).view(np.uint16)
        counts += np.bincount(bins, minlength=_PATTERNS)
        totals += np.bincount(bins, weights=np.where(np.isfinite(chunk), chunk, 0), minlength=_PATTERNS)
    means = np.where(np.isfinite(_VALUES), totals / np.maximum(counts, 1), _VALUES)
    return _histogram(counts, means, name)


def _scale(weight: np.ndarray) -> float:
    """The power of two that brings the largest finite magnitude into 2¹⁴ … 2¹⁵."""
    largest = max(float(np.max(np.abs(chunk), where=np.isfinite(chunk), initial=0)) for chunk in _chunks(weight))
    return 2.0 ** (15 - math.frexp(largest)[1]) if largest else 1.0


def _histogram(counts: np.ndarray, values: np.ndarray, name: str) -> _Histogram:
    """Of elements counted by pattern; ``values`` is what each pattern stands for, and ascends as float16 does."""
    if invalid := int(counts.sum() - counts[_ASCENDING].sum()):
        raise InputError(f"{name}: {invalid} elements are NaN; a palette cannot hold them")
    used = _ASCENDING[counts[_ASCENDING] > 0]
    infinite = np.isinf(values[used])
    finite = used[~infinite]
    first = np.flatnonzero(np.diff(values[finite], prepend=-np.inf))  # zero has two patterns
    weights = np.add.reduceat(counts[finite], first).astype(np.float64)
    return _Histogram(values[finite[first]], weights, tuple(values[used[infinite]].tolist()))


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


def _nearest(weight: np.ndarray, lut: np.ndarray) -> np.ndarray:
    entries = lut.astype(np.float64)
    indices = np.empty(weight.size, np.uint8)
    if weight.dtype == np.float16:
        table = _index(entries, _VALUES).astype(np.uint8)
        for source, target in zip(_chunks(weight.view(np.uint16), _CACHED), _chunks(indices, _CACHED), strict=True):
            np.take(table, source, out=target, mode="clip")  # no pattern is out of range; "raise" copies first
    else:
        for start in range(0, weight.size, _CHUNK):
            chunk = weight.reshape(-1)[start : start + _CHUNK]
            indices[start : start + _CHUNK] = _index(entries, chunk.astype(np.float64))
    return indices.reshape(weight.shape)
