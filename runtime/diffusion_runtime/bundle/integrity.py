"""Whether the files of a folder of models are those that its manifest was written for."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_runtime.bundle.manifest import FILE_NAME, Manifest
from diffusion_runtime.errors import PackageError
from diffusion_runtime.real_path import is_inside

_SHOWN = 5
TOKENIZER = "tokenizer"
"""What `faults` calls the tokenizers' files, which are of no component, and what further sizes' folders share."""


class Fault(enum.StrEnum):
    """What is wrong with a file; the value completes a sentence about it."""

    MISSING = "is missing"
    CHANGED = "has changed"
    OUTSIDE = "leads outside of the folder"


@dataclass(frozen=True, slots=True)
class Hashes:
    """Files' SHA-256 in hexadecimal. Each file is read once, however often it is asked for, however many hard links
    it has: a file that is written anew in place has another time, one that replaces it another number."""

    _known: dict[tuple[int, int, int, int], str] = field(default_factory=dict)

    def of(self, path: Path) -> str:
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in self._known:
            self._known[key] = sha256(path)
        return self._known[key]


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, models: Iterable[str], known: Hashes | None = None) -> dict[str, str]:
    """SHA-256 of each regular file below the named models, by its path relative to ``folder``, sorted."""
    known = known or Hashes()
    files = sorted(file for name in models for file in (folder / name).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): known.of(file) for file in files}


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer that lies in ``folder``, beside models or alone."""
    found = (path for path in folder.iterdir() if path.suffix in (".json", ".txt") and path.name != FILE_NAME)
    return sorted(path for path in found if path.is_file())


def tokenizer_hashes(folder: Path, places: Iterable[str | None], known: Hashes | None = None) -> dict[str, str]:
    """SHA-256 of the tokenizers' files in the ``places``, folders relative to ``folder``; None is passed over."""
    known = known or Hashes()
    files = [file for place in places if place is not None for file in tokenizer_files(folder / place)]
    return {file.relative_to(folder).as_posix(): known.of(file) for file in files}


def size_bytes(folder: Path, models: Iterable[str]) -> int:
    """Bytes of all files below the named models."""
    return sum(file.stat().st_size for name in models for file in (folder / name).rglob("*") if file.is_file())


def measured(folder: Path, models: Collection[str], known: Hashes | None = None) -> dict[str, Any]:
    """What a manifest's `Component` says of its files."""
    return {"sha256": hashes(folder, models, known), "size_bytes": size_bytes(folder, models)}


def faults(manifest: Manifest, folder: Path, known: Hashes | None = None) -> dict[str, dict[str, Fault]]:
    """What is wrong with the models' files, by component and file, and with the tokenizers' (`TOKENIZER`); nothing
    for what is whole.

    Files are compared by the manifest's hashes. A component without hashes is checked for presence alone."""
    known = known or Hashes()
    found = {TOKENIZER: _changed(folder, manifest.tokenizer_sha256, known)}
    for component, part in manifest.components.items():
        missing = {name: Fault.MISSING for name in part.files if not (folder / name).exists()}
        found[component] = missing | _changed(folder, part.sha256, known)
    for size in map(str, manifest.size_folders):  # what lies there beside the models of that size
        shared = [part.sha256 for part in manifest.components.values() if not part.sizes]
        for expected in (manifest.tokenizer_sha256, *shared):
            found[TOKENIZER] |= {
                f"{size}/{name}": fault for name, fault in _changed(folder / size, expected, known).items()
            }
        if not (folder / size / FILE_NAME).is_file():
            found[TOKENIZER][f"{size}/{FILE_NAME}"] = Fault.MISSING
    return {name: wrong for name, wrong in found.items() if wrong}


def check_files(manifest: Manifest, folder: Path, known: Hashes | None = None) -> None:
    """Raise one PackageError that lists what is missing, changed or leads outside of ``folder`` (`faults`)."""
    wrong = faults(manifest, folder, known)
    if wrong:
        raise damaged(folder, wrong)


def damaged(folder: Path, wrong: Mapping[str, Mapping[str, Fault]]) -> PackageError:
    """The error for faults of the models in ``folder``."""
    told = sorted({f"{name} {fault}" for files in wrong.values() for name, fault in files.items()})
    shown = "; ".join(told[:_SHOWN]) + (f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else "")
    return PackageError(f"{folder / FILE_NAME}: does not fit the files: {shown}; convert or download them again")


def _changed(folder: Path, expected: Mapping[str, str], known: Hashes) -> dict[str, Fault]:
    found = {name: _fault(folder, name, digest, known) for name, digest in expected.items()}
    return {name: fault for name, fault in found.items() if fault is not None}


def _fault(folder: Path, name: str, expected: str, known: Hashes) -> Fault | None:
    path = folder / name
    if not is_inside(path, folder):
        return Fault.OUTSIDE
    if not path.is_file():
        return Fault.MISSING
    return None if known.of(path) == expected else Fault.CHANGED
