"""Packages that differ in little but their shapes: made to share one weight file.

For macOS 15 and iOS 18 they become functions of one package (`join`); older systems know no functions, and get
packages whose weight files are hard links of one (`share`). Each stored value is written once, whatever package or
function it is of; where the packages' weight files are equal already, as those of `original` attention at two sizes
are, nothing is written at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffusion_runtime.atomic import work
from diffusion_runtime.bundle.integrity import Hashes
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.links import share_file
from diffusion_runtime.mil.functions import joined
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import Package, open_package, resolve, write_package
from diffusion_runtime.mil.program import Blob, DType, Program, TensorType, Value
from diffusion_runtime.mil.rewrite import WEIGHT_PATH, rewrite, stored_by
from diffusion_runtime.mil.weights import WeightFile, WeightWriter


def join(packages: Mapping[str, Path], output: Path, known: Hashes | None = None) -> None:
    """Write ``packages``, each of one function, to ``output`` as functions of the names given; the first is the
    default. ``output`` appears once every stored value has been compared with its original.

    Weights are streamed: one at a time is held. Raises InputError for packages of systems without functions,
    PackageError for damaged ones, VerificationError where a value was not written as it was meant, StorageError for
    what the disk refuses."""
    opened = [open_package(path) for path in packages.values()]
    with work(output.parent) as slot, _one_file(opened, slot / "weight.bin", known or Hashes()) as models:
        write_package(joined(dict(zip(packages, models, strict=True))), output, _weights(slot))


def share(packages: Sequence[Path], outputs: Sequence[Path], known: Hashes | None = None) -> None:
    """Write ``packages`` to ``outputs``, with hard links of one weight file. Raises as `join`."""
    _share([open_package(path) for path in packages], outputs, known or Hashes())


def take_apart(source: Path, function: str | None, output: Path) -> None:
    """Write one function of ``source`` to ``output`` as a package of its own, whose weight file is a hard link.
    Raises as `Package.of` does."""
    _share([open_package(source).of(function)], [output], Hashes())


def _share(packages: Sequence[Package], outputs: Sequence[Path], known: Hashes) -> None:
    with work(outputs[0].parent) as slot:
        shared = slot / "shared.bin"
        with _one_file(packages, shared, known) as models:
            for model, output in zip(models, outputs, strict=True):
                if shared.exists():
                    share_file(shared, slot / "weight.bin")
                output.parent.mkdir(parents=True, exist_ok=True)
                write_package(model, output, _weights(slot))


def _weights(slot: Path) -> Path | None:
    path = slot / "weight.bin"
    return path if path.exists() else None


@contextmanager
def _one_file(packages: Sequence[Package], weights: Path, known: Hashes) -> Iterator[list[Model]]:
    """In this context ``weights`` holds what all ``packages`` store (it does not exist where they store nothing);
    gives their models, whose values lie there."""
    files = _weight_files(packages)
    usual = all(
        path in [resolve(package.root, WEIGHT_PATH, package.path) for package in packages] for path in files
    )
    # Equal files already, as `original` attention's at two sizes are: nothing to write.
    if usual and len({known.of(path) for path in files}) <= 1:
        for path in files[:1]:
            share_file(path, weights)
        yield [package.model for package in packages]
        return
    with WeightWriter(weights) as writer:
        store = _Store(writer)
        programs = [rewrite(package.model.program, stored_by(store.put, package)) for package in packages]
    for package, program in zip(packages, programs, strict=True):
        _check(package, program, weights)
    yield [replace(package.model, program=program) for package, program in zip(packages, programs, strict=True)]


def _weight_files(packages: Sequence[Package]) -> list[Path]:
    """The files that the packages' values lie in; those of one package once."""
    return [
        path
        for package in packages
        for path in dict.fromkeys(
            resolve(package.root, value.data.path, package.path)
            for value in _stored(package.model.program)
            if isinstance(value.data, Blob)
        )
    ]


def _stored(program: Program) -> list[Value]:
    """The values that lie in a weight file, in the program's order."""
    found: list[Value] = []

    def see(value: Value) -> Value:
        if isinstance(value.data, Blob):
            found.append(value)
        return value

    rewrite(program, see)
    return found


class _Store:
    """Writes values to one file, those of one type with the same bytes once."""

    def __init__(self, writer: WeightWriter) -> None:
        self._writer = writer
        self._written: dict[tuple[DType, int, bytes], Blob] = {}

    def put(self, array: np.ndarray, dtype: DType) -> Blob:
        key = (
            dtype,
            array.size,
            hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest(),
        )
        if key not in self._written:
            self._written[key] = Blob(WEIGHT_PATH, self._writer.add(array, dtype))
        return self._written[key]


def _check(package: Package, program: Program, weights: Path) -> None:
    """Compare each stored value of ``package`` with its copy in ``program`` and the file ``weights``."""
    written = WeightFile(weights)
    for value, copy in zip(_stored(package.model.program), _stored(program), strict=True):
        if isinstance(value.type, TensorType) and isinstance(value.data, Blob) and isinstance(copy.data, Blob):
            shape = tuple(size or 0 for size in value.type.shape)
            found = written.packed(copy.data.offset, value.type.dtype, shape)
            own = package.weight_file(value.data)
            if not np.array_equal(found, own.packed(value.data.offset, value.type.dtype, shape)):
                raise VerificationError(f"{package.path}: a value was not written to the shared file as it is")
            written.release()
            own.release()
