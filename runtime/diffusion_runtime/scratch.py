"""Folders among the system's temporary files, for what a library reads from files alone; swept as all work is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion_runtime.atomic import work


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder that vanishes with the block. What killed processes have left is removed first."""
    own = Path(tempfile.gettempdir()) / f"coreml-sd-{os.getuid()}"  # other users' folders must not be written to
    try:
        with work(own) as slot:
            folder = slot / "scratch"
            folder.mkdir()
            yield folder
    finally:
        with suppress(OSError):  # others are in it
            own.rmdir()
