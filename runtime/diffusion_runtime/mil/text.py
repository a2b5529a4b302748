"""Compiled models (.mlmodelc): the program from ``model.mil``, everything else from ``coremldata.bin``."""

from __future__ import annotations

import struct
from pathlib import Path

from diffusion_runtime.errors import PackageError, UnsupportedError
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.proto import ML_PROGRAM
from diffusion_runtime.mil.text_parse import read_text
from diffusion_runtime.real_path import is_there

TEXT_NAME = "model.mil"
CONTAINER = struct.Struct("<II20xQ7sQ24xQ")
"""The head of coremldata.bin: kind, writer's version, length and text of "generic", specification version, and the
length of the serialised ModelDescription that follows. A record (u32 kind, 12 zeros) per function ends the file."""


def read_compiled(path: Path) -> Model:
    """The model in an .mlmodelc folder; equal to its package's, except for what a compiler adds and sorts.

    Raises PackageError (damaged) or UnsupportedError (a model that is no ML Program, or text that is not covered).
    """
    version, described = _read_container(path / "coremldata.bin")
    program = read_text(path / TEXT_NAME)
    try:
        return Model(version, program, described)
    except PackageError as error:
        raise PackageError(f"{path / 'coremldata.bin'}: {error}") from error


def _read_container(path: Path) -> tuple[int, bytes]:
    """Specification version and serialised ModelDescription."""
    try:
        if not is_there(path, PackageError):  # opening a pipe would wait
            raise PackageError(f"{path}: cannot be read: no such file")
        data = path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path}: cannot be read: {error}") from error
    if len(data) < CONTAINER.size:
        raise PackageError(f"{path}: truncated: {len(data)} bytes, expected at least {CONTAINER.size}")
    kind, _, length, name, version, size = CONTAINER.unpack_from(data)
    if kind != ML_PROGRAM:
        raise UnsupportedError(
            f"{path}: a compiled model of kind {kind}: only ML Programs ({ML_PROGRAM}) are covered"
        )
    if (length, name) != (7, b"generic") or CONTAINER.size + size > len(data):
        raise PackageError(f"{path}: damaged: {len(data)} bytes, a description of {size} bytes, name {name!r}")
    return version, data[CONTAINER.size : CONTAINER.size + size]
