"""Operations' keys in metadata.json's histogram (``Ios16.einsum``), from the table in op_versions.txt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Key:
    """An operation's key in the histogram, and whether it was seen in a real compiled model."""

    text: str
    observed: bool


def histogram_key(operation: str, opset: int) -> Key | None:
    """The key of ``operation`` in a function of ``opset`` (15 … 18); None where the table does not have it."""
    versions = op_versions().get(operation)
    if versions is None:
        return None
    reached = [version for version in versions if version <= opset]
    newest = max(reached, default=15)
    return Key(_spelled(operation, newest), opset == 15 or versions.get(newest, False))


@cache
def op_versions() -> Mapping[str, Mapping[int, bool]]:
    """Operation -> opset that redefined it -> whether that was observed (else it is inferred)."""
    text = files(__package__).joinpath("op_versions.txt").read_text(encoding="utf-8")
    rows = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {name: {int(mark.rstrip("?")): not mark.endswith("?") for mark in marks} for name, *marks in rows}


def _spelled(operation: str, version: int) -> str:
    first, *rest = operation.split("_")
    camel = first + "".join(part.capitalize() for part in rest)
    return f"Ios{version}.{camel}" if version > 15 else camel[0].upper() + camel[1:]
