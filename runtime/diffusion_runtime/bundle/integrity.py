"""Whether the files of a folder of models are those that its manifest was written for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from diffusion_runtime.bundle.manifest import FILE_NAME, Manifest
from diffusion_runtime.errors import PackageError


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, models: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each regular file below the named models, by its path relative to ``folder``, sorted."""
    files = sorted(file for name in models for file in (folder / name).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def size_bytes(folder: Path, models: Iterable[str]) -> int:
    """Bytes of all files below the named models."""
    return sum(file.stat().st_size for name in models for file in (folder / name).rglob("*") if file.is_file())


def check_files(manifest: Manifest, folder: Path) -> None:
    """Raise one PackageError that lists what is missing, changed or leads outside of ``folder``.

    Models are compared by the manifest's hashes. A component without hashes is checked for presence alone.
    """
    wrong = [
        f"{name} is missing"
        for component in manifest.components.values()
        for name in component.files
        if not (folder / name).exists()
    ]
    for component in manifest.components.values():
        for name, expected in component.sha256.items():
            wrong += _wrong(folder, name, expected)
    if wrong:
        shown = "; ".join(sorted(set(wrong))[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise PackageError(f"{folder / FILE_NAME}: does not fit the files: {shown}; convert or download them again")


def _wrong(folder: Path, name: str, expected: str) -> list[str]:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return [f"{name} leads outside of the folder"]
    if not path.is_file():
        return [f"{name} is missing"]
    return [] if sha256(path) == expected else [f"{name} has changed"]
