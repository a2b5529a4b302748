"""Files that are in a user's folder only while their writer lives: a note of them lies in its work folder.

The note holds what tells such a file from any other that took its name later: that one is never removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

_NOTE = "shown.json"


def show(slot: Path, path: Path, write: Callable[[Path], object]) -> None:
    """Put what ``write`` writes to the path that it is given at ``path``, in place of what was put there
    before, and note it in the work folder ``slot``. A file that another program has put there stays."""
    new = slot / path.name
    write(new)
    if os.path.lexists(path) and not _is_noted(slot, path):
        return
    marks = [*_noted(slot).get(path.name, [])[-1:], _mark(new)]  # both: a kill may come before the last line
    (slot / f"{_NOTE}.new").write_text(json.dumps({path.name: marks}), encoding="utf-8")
    (slot / f"{_NOTE}.new").replace(slot / _NOTE)
    new.replace(path)


def remove_shown(slot: Path) -> None:
    """Remove what was put beside the work folder of ``slot`` and has not been changed since."""
    for path in (slot.parent.parent / name for name in _noted(slot) if name == Path(name).name):
        if _is_noted(slot, path):
            path.unlink()


def _noted(slot: Path) -> dict[str, list[list[int]]]:
    try:
        return {name: list(marks) for name, marks in json.loads((slot / _NOTE).read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _mark(path: Path) -> list[int]:
    status = path.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _is_noted(slot: Path, path: Path) -> bool:
    return os.path.lexists(path) and _mark(path) in _noted(slot).get(path.name, [])
