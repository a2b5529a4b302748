"""Palettize a package: weights are read where they lie, a few at a time, and written in one pass."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from diffusion_convert.palettize.entries_process import EntriesProcess
from diffusion_convert.palettize.known import Known, Stored, key_of
from diffusion_convert.palettize.palette import (
    TOGETHER,
    Entries,
    Histogram,
    Palette,
    Table,
    best_entries,
    group_slices,
    histogram,
    packed,
    palettize,
    palettize_groups,
    snr_db,
    squared_errors,
    stored_energies,
    tables,
)
from diffusion_convert.palettize.palettize_options import (
    PER_GROUPED_CHANNEL,
    PalettizeOptions,
    Report,
    WeightReport,
    chosen_weights,
    packs_by_type,
)
from diffusion_convert.palettize.select import Weight
from diffusion_runtime.atomic import disk_errors, work
from diffusion_runtime.errors import InputError, VerificationError
from diffusion_runtime.mil.package import Package, open_package, resolve, write_package
from diffusion_runtime.mil.packing import pack
from diffusion_runtime.mil.program import Blob, DType, Operation, TensorType, Value
from diffusion_runtime.mil.rewrite import WEIGHT_PATH, rewrite, stored_in
from diffusion_runtime.mil.weights import WeightFile, WeightWriter
from diffusion_runtime.real_path import real_path

_INDEX_TYPES = {1: DType.UINT1, 2: DType.UINT2, 3: DType.UINT3, 4: DType.UINT4, 6: DType.UINT6, 8: DType.UINT8}
_ERROR_TOLERANCE = 1e-3  # sums of squares are taken in float32 over 65,536 elements at a time

_AHEAD = 2  # batches of weights whose tables are looked for before they are needed
_LONG = 2**25
"""Elements of weights: where there are more, the start of a process (a third of a second) is well spent."""

OnWeight = Callable[[str, int, int], None]
"""Called with a weight's name, how many weights are done, and how many there are."""


def palettize_package(
    source: Path,
    output: Path,
    options: PalettizeOptions,
    progress: OnWeight | None = None,
    known: Known | None = None,
) -> Report:
    """Write ``source``, an ML Program, to ``output`` with its weights palettized as ``options`` says.

    A run that is stopped leaves ``output`` as it was. Memory: a few weights at a time, one per core and one in
    hand. Every weight is decompressed from the written file and compared with the original before ``output``
    appears. ``known``: palettes of other packages with equal weights, to which those made here are added.

    Raises InputError (options that cannot be carried out, a palettized input, a program without weights),
    UnsupportedError (not an ML Program), PackageError (damaged), VerificationError (the file does not decompress to
    what was meant), StorageError (what the disk refuses).
    """
    package = _open(source, output)
    targets = chosen_weights(package, options)
    with disk_errors(output), work(output.parent) as slot:
        unfinished = slot / "weight.bin"
        with WeightWriter(unfinished) as writer, _Maker(package, options) as maker:
            keys = [None] * len(targets) if known is None else maker.keys(list(targets.values()))
            palettes = maker.palettes(list(targets.values()), keys, known or Known())
            palettizer = _Palettizer(package, writer, targets, palettes, progress or _silent)
            program = rewrite(package.model.program, stored_in(writer, package), palettizer)
        with ThreadPoolExecutor(_threads()) as pool:
            reports = tuple(pool.map(lambda written: _checked(package, unfinished, written), palettizer.written))
        before = folder_bytes(source)
        if known is not None:
            known.add(unfinished, keys, palettizer.written)
        write_package(replace(package.model, program=program), output, unfinished)
    return Report(reports, options, before, folder_bytes(output))


def stored_array(package: Package, value: Value) -> np.ndarray:
    """A tensor's elements. A stored one is mapped anew, so that its pages leave memory with the array."""
    if isinstance(value.data, Blob) and isinstance(value.type, TensorType):
        shape = tuple(size or 0 for size in value.type.shape)
        return _weight_file(package, value.data).read(value.data.offset, value.type.dtype, shape)
    return package.array(value)


def folder_bytes(path: Path) -> int:
    """The size of a package on disk, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _threads() -> int:
    return os.cpu_count() or 1


def _silent(_name: str, _done: int, _total: int) -> None:
    pass


def _open(source: Path, output: Path) -> Package:
    package = open_package(source)
    if (source / "model.mil").exists():
        raise InputError(f"{source}: a compiled model; give the .mlpackage that it was compiled from")
    if output.suffix != ".mlpackage":
        raise InputError(f"{output}: the output's name must end in .mlpackage")
    if real_path(output) == real_path(source):
        raise InputError(f"{output}: the output is the input; give another name")
    return package


def _weight_file(package: Package, blob: Blob) -> WeightFile:
    return WeightFile(resolve(package.root, blob.path, package.path))


@dataclass(frozen=True, slots=True)
class _Packed:
    """A palette as it is stored; ``indices`` are packed bytes."""

    lut: np.ndarray
    indices: np.ndarray
    squared_error: float


_Target = tuple[Weight, int]
"""A weight and the bits of its indices."""


class _Maker:
    """Makes palettes in threads. One alone looks for entries, and where that is long has a process do it
    (`entries_process`), while others count, index and pack."""

    def __init__(self, package: Package, options: PalettizeOptions) -> None:
        self._package, self._options = package, options
        self._by_type = packs_by_type(package)
        self._pool, self._clustering = ThreadPoolExecutor(_threads()), ThreadPoolExecutor(1)
        self._elsewhere = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clustering.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)
        self._elsewhere.close()

    def keys(self, targets: Sequence[_Target]) -> list[Hashable]:
        """Of each target; those of equal keys have equal palettes, but for the rank of one table."""

        def key(target: _Target) -> Hashable:
            weight, bits = target
            axis = _group_axis(self._options, weight)
            groups = None if axis is None else (axis, self._options.group_size, weight.shape)
            return key_of(self._array(weight), bits, groups)

        return list(self._pool.map(key, targets))

    def palettes(self, targets: Sequence[_Target], keys: Sequence[Hashable], known: Known) -> Iterator[_Packed]:
        """The palettes of ``targets`` in order: those ``known`` by their keys, the others as they are made."""
        made = self._made([target for target, key in zip(targets, keys, strict=True) if key not in known])
        for (weight, _), key in zip(targets, keys, strict=True):
            found = _Packed(*known.read(key)) if key in known else next(made)
            if _group_axis(self._options, weight) is None:
                # In iOS 18's rank: the weight's, one for the entries, one for the length of an entry (1).
                rank = (*(1,) * len(weight.shape), -1, 1) if self._by_type else (-1,)
                found = replace(found, lut=found.lut.reshape(rank))
            yield found

    def _made(self, targets: Sequence[_Target]) -> Iterator[_Packed]:
        """The palettes of ``targets`` in order, a few ahead of what is taken."""
        batches = [targets[start : start + TOGETHER] for start in range(0, len(targets), TOGETHER)]
        long = sum(weight.size for weight, _ in targets) > _LONG and _threads() > 1
        find = self._elsewhere.enter_context(EntriesProcess()) if long else best_entries
        ahead = deque(self._tables(batch, find) for batch in batches[:_AHEAD])
        pending: deque[Future[_Packed]] = deque()
        for number, batch in enumerate(batches, len(ahead)):
            made = iter(ahead.popleft().result())
            if number < len(batches):
                ahead.append(self._tables(batches[number], find))
            for weight, bits in batch:
                table = next(made) if _group_axis(self._options, weight) is None else None
                pending.append(self._pool.submit(self._palette, weight, bits, table))
                if len(pending) > _threads():
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _tables(self, batch: Sequence[_Target], find: Entries) -> Future[list[Table]]:
        """Of the weights that have one palette: they are counted at once, and clustered together after that."""
        counted = [
            (self._pool.submit(self._histogram, weight), bits)
            for weight, bits in batch
            if _group_axis(self._options, weight) is None
        ]
        return self._clustering.submit(lambda: tables([(one.result(), bits) for one, bits in counted], find))

    def _histogram(self, weight: Weight) -> Histogram:
        return histogram(self._array(weight), weight.name)

    def _palette(self, weight: Weight, bits: int, table: Table | None) -> _Packed:
        if table is not None:
            return _Packed(table.lut, *packed(self._array(weight), bits, table))
        palette = palettize_as(self._options, weight, self._array(weight), bits)
        indices = palette.indices.reshape(-1)
        return _Packed(palette.lut, indices if bits == 8 else pack(indices, bits), palette.squared_error)

    def _array(self, weight: Weight) -> np.ndarray:
        return stored_array(self._package, weight.value)


def palettize_as(options: PalettizeOptions, weight: Weight, array: np.ndarray, bits: int) -> Palette:
    """``array``, the values of ``weight``, palettized: with one palette where groups do not divide it."""
    axis = _group_axis(options, weight)
    if axis is not None:
        return palettize_groups(array, bits, axis, options.group_size, weight.name)
    return palettize(array, bits, weight.name)


def errors_as(
    options: PalettizeOptions, weights: Sequence[tuple[Weight, np.ndarray]], widths: Sequence[int]
) -> list[dict[int, float]]:
    """For each weight and its values `palettize_as`'s squared error at each of ``widths``, nearly, for a small part
    of its time."""
    split = [_parts(options, weight, array) for weight, array in weights]
    named = [(part, weight.name) for (weight, _), parts in zip(weights, split, strict=True) for part in parts]
    found = iter(squared_errors(named, widths))
    by_weight = [[next(found) for _ in parts] for parts in split]
    return [{bits: sum(part[bits] for part in parts) for bits in widths} for parts in by_weight]


def _parts(options: PalettizeOptions, weight: Weight, array: np.ndarray) -> list[np.ndarray]:
    """What shares a palette."""
    axis = _group_axis(options, weight)
    if axis is None:
        return [array]
    slices = group_slices(array.shape, axis, options.group_size, weight.name)
    return [np.ascontiguousarray(array[part]) for part in slices]


def _group_axis(options: PalettizeOptions, weight: Weight) -> int | None:
    """The axis whose channels are grouped; None where all share one palette."""
    grouped = options.granularity == PER_GROUPED_CHANNEL and weight.axis is not None
    return weight.axis if grouped and weight.shape[weight.axis or 0] % options.group_size == 0 else None


@dataclass(frozen=True, slots=True)
class _Written(Stored):
    """A palettized weight in the new file, as it must decompress."""

    weight: Weight
    bits: int


@dataclass(slots=True)
class _Palettizer:
    """Puts look-ups in the place of the constants that are ``targets``, for `rewrite`."""

    package: Package
    writer: WeightWriter
    targets: Mapping[str, tuple[Weight, int]]
    palettes: Iterator[_Packed]
    progress: OnWeight
    written: list[_Written] = field(default_factory=list)
    _stored: dict[str, _Written] = field(default_factory=dict)

    def __call__(self, operation: Operation) -> Operation | None:
        is_target = operation.type == "const" and operation.outputs[0].name in self.targets
        return self._palettized(operation) if is_target else None

    def _palettized(self, operation: Operation) -> Operation:
        name = operation.outputs[0].name
        if name not in self._stored:
            self._stored[name] = self._store(name)
            self.written.append(self._stored[name])
            self.progress(name, len(self.written), len(self.targets))
        stored = self._stored[name]
        kept = {key: value for key, value in operation.attributes.items() if key != "val"}
        operation = replace(operation, type="constexpr_lut_to_dense", inputs={}, attributes=kept)
        if packs_by_type(self.package):
            return replace(operation, inputs={"indices": (stored.indices,), "lut": (stored.lut,)})
        shape = np.array(stored.weight.shape, np.uint32)
        sizes = Value(TensorType(DType.UINT32, shape.shape), shape)
        return replace(operation, attributes={**kept, "indices": stored.indices, "lut": stored.lut, "shape": sizes})

    def _store(self, name: str) -> _Written:
        weight, bits = self.targets[name]
        made = next(self.palettes)
        entry_type = DType.FLOAT16 if made.lut.dtype == np.float16 else DType.FLOAT32
        if packs_by_type(self.package):
            index_type, shape = _INDEX_TYPES[bits], weight.shape
        else:
            index_type, shape = DType.UINT8, made.indices.shape
        indices = self.writer.add(made.indices, index_type, weight.size)
        return _Written(
            Value(TensorType(index_type, shape), Blob(WEIGHT_PATH, indices)),
            Value(TensorType(entry_type, made.lut.shape), Blob(WEIGHT_PATH, self.writer.add(made.lut, entry_type))),
            made.squared_error,
            weight,
            bits,
        )


def _checked(package: Package, path: Path, written: _Written) -> WeightReport:
    """Decompress one weight from the new file at ``path`` and compare it with the original."""
    weight = written.weight
    lut, indices = written.read(WeightFile(path))
    original = stored_array(package, weight.value)
    signal, noise = stored_energies(original, lut.astype(np.float32), indices, written.bits)
    if not math.isclose(noise, written.squared_error, rel_tol=_ERROR_TOLERANCE, abs_tol=1e-9 * signal):
        raise VerificationError(
            f"{package.path}: {weight.name} at {written.bits} bits decompresses with a squared error of {noise:g}, "
            f"expected {written.squared_error:g}: the weight file was not written as it was meant"
        )
    return WeightReport(weight.name, weight.shape, written.bits, snr_db(signal, noise), noise)
