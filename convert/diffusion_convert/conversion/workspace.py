"""Where a conversion works: a folder of its own in the work folder of its output (`diffusion_runtime.atomic`).

OUTPUT/.coreml-sd/conversion-{fingerprint}/parts/{name}/…      finished components
                                          whole/{name}/…      earlier 16-bit packages, to be palettized
                                          references/*.npz    what the checkpoint's own networks computed
                                          references/*-runs/  what packages computed, for other attentions'

A conversion that was stopped, in whatever way, leaves whole parts, and goes on with them. What is put together of
them appears in one commit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusion_runtime.atomic import WORK_FOLDER, remove
from diffusion_runtime.errors import StorageError

_PREFIX = "conversion-"
_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder of one conversion's finished parts."""

    root: Path

    def part(self, name: str) -> Path:
        return self.root / "parts" / name

    def whole(self, name: str) -> Path:
        return self.root / "whole" / name

    @property
    def references(self) -> Path:
        return self.root / "references"


@contextmanager
def workspace(hidden: Path, name: str) -> Iterator[Workspace]:
    """The work folder of a conversion in ``hidden``, that of its output; those of others are removed.

    If an error or Ctrl-C ends the block, finished parts stay; the folder is removed if there are none.
    """
    place = Workspace(hidden / f"{_PREFIX}{name[:16]}")
    clear(hidden, place)
    try:
        yield place
    except BaseException:
        if not kept(hidden.parent):
            shutil.rmtree(place.root, ignore_errors=True)
        raise


def clear(hidden: Path, place: Workspace | None = None) -> None:
    """Remove the work folders of conversions in ``hidden``, except ``place``."""
    for path in hidden.glob(f"{_PREFIX}*"):
        if place is None or path != place.root:
            remove(path)


def kept(output: Path) -> tuple[str, ...]:
    """The finished parts that a stopped conversion has left in ``output``, by name."""
    records = (output / WORK_FOLDER).glob(f"{_PREFIX}*/parts/[!.]*/record.json")
    return tuple(sorted(path.parent.name for path in records))


def check_space(output: Path, needed_bytes: int) -> None:
    """Raises StorageError where the disk of ``output`` has less room than that. ``output`` need not exist."""
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes + _RESERVE_BYTES:
        raise StorageError(
            f"{output}: about {_size(needed_bytes)} are needed, but its disk has {_size(free)} free; name another "
            "place, or convert less: --components, --attention, --no-zip, --no-compiled"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
