"""Where a path leads, links followed, and what is there."""

from __future__ import annotations

import os
from pathlib import Path

from diffusion_runtime.errors import DiffusionError


def real_path(path: Path) -> Path:
    """As ``Path.resolve``, which up to Python 3.12 raises RuntimeError where links lead in a circle: here such a
    path comes back as far as it can be followed, and opening it is an OSError as for any file that is not there."""
    return Path(os.path.realpath(path))


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` leads to a place in ``folder``, or to ``folder`` itself."""
    return real_path(path).is_relative_to(real_path(folder))


def is_there(path: Path, error: type[DiffusionError]) -> bool:
    """Whether a file that need not be there is. Raises ``error`` for a folder, a pipe, a device or a link to
    nowhere: passed over, it would be taken for a file that was never there."""
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise error(f"{path}: is no regular file")
    return False
