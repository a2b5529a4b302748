"""Where in a torch checkpoint's zip its parts lie, found without reading them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffusion_runtime.errors import CheckpointError

MAX_PICKLE_BYTES = 8 * 2**20
"""The part of a checkpoint that is not tensor data; 0.4 MB in the official Stable Diffusion files. A program
of so many bytes runs for a few seconds at most."""

_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True, slots=True)
class Archive:
    """Where in the file the members of torch's zip lie: begin and size in bytes, by name without the folder."""

    path: Path
    members: Mapping[str, tuple[int, int]]

    @staticmethod
    def open(path: Path) -> Archive:
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                infos = archive.infolist()
                members = {info.filename: _extent(path, file, info) for info in infos}
        except (zipfile.BadZipFile, RuntimeError, struct.error, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a checkpoint in one of torch's formats ({error}); save it again as .safetensors with "
                "a tool that you trust"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        # Of two files of one name, readers differ in which they take.
        if len(members) != len(infos):
            raise CheckpointError(f"{path}: damaged checkpoint: the zip names a file twice")
        programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise CheckpointError(f"{path}: not a checkpoint in torch's zip format: expected one FOLDER/data.pkl")
        folder = programs[0].removesuffix("data.pkl")
        found = Archive(path, {name.removeprefix(folder): where for name, where in members.items()})
        if "byteorder" in found.members and (order := found.read("byteorder")) != b"little":
            raise CheckpointError(f"{path}: byte order {order!r}: only little-endian checkpoints can be mapped")
        return found

    def read(self, name: str) -> bytes:
        begin, size = self.members[name]
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.path}: {name} has {size} bytes; expected at most {MAX_PICKLE_BYTES}")
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(size)


def _extent(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise CheckpointError(f"{path}: {info.filename!r} is compressed or encrypted, which torch never writes")
    file.seek(info.header_offset)
    # The directory at the zip's end has an extra field of its own: only the local header says where data begin.
    name_length, extra_length = struct.unpack("<26x2H", file.read(_LOCAL_HEADER_BYTES))
    begin = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
    if begin + info.file_size > path.stat().st_size:
        raise CheckpointError(f"{path}: cut short: {info.filename!r} ends beyond the end of the file")
    return begin, info.file_size
