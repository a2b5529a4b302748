"""How what our compiler writes is compared with what Apple's wrote of the same package: byte for byte, but for the
order of a map of user metadata and of JSON keys, which Apple's draws anew at every run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from diffusion_runtime.mil.text import CONTAINER
from diffusion_runtime.mil.text_parse import read_text
from diffusion_runtime.mil.wire import fields

APPLES_OWN = ("coremlc-component-MIL", "coremlc-version")
METADATA_FIELD = 100


def compiler_versions(compiled: Path) -> dict[str, str]:
    """What Apple's compiler notes of itself in model.mil: all that does not follow from the package there."""
    return {key: value for key, value in build_info(compiled / "model.mil").items() if key in APPLES_OWN}


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """The files of the two compiled models that are other than each other."""
    if files(ours) != files(theirs):
        only = sorted(files(ours) ^ files(theirs))
        yield f"files that one of them lacks: {', '.join(only)}"
    for name in sorted(files(ours) & files(theirs)):
        read = READERS.get(name, Path.read_bytes)
        if read(ours / name) != read(theirs / name):
            yield name


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def split_container(data: bytes) -> tuple[bytes, bytes, list[bytes], bytes]:
    """Head, description without metadata entries, those entries in order, trailer."""
    size = CONTAINER.unpack_from(data)[-1]
    described = data[CONTAINER.size : CONTAINER.size + size]
    metadata = dict(fields(described))[METADATA_FIELD]
    entries = sorted(entry for number, entry in fields(metadata) if number == METADATA_FIELD)
    rest = [item for item in fields(described) if item[0] != METADATA_FIELD]
    rest += [item for item in fields(metadata) if item[0] != METADATA_FIELD]
    return data[: CONTAINER.size], repr(rest).encode(), entries, data[CONTAINER.size + size :]


def build_info(path: Path) -> dict[str, str]:
    """The program attribute buildInfo of a model.mil."""
    pairs = read_text(path).attributes["buildInfo"].data
    assert isinstance(pairs, tuple)
    found = {}
    for pair in pairs:
        assert isinstance(pair, tuple)
        found[str(pair[0].data)] = str(pair[1].data)
    return found


READERS: Mapping[str, Callable[[Path], object]] = {
    "coremldata.bin": lambda path: split_container(path.read_bytes()),
    "metadata.json": lambda path: json.loads(path.read_text(encoding="utf-8")),
}
"""What is compared of a file that Apple's compiler does not always write alike; of any other, its bytes."""
