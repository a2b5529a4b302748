"""Sizes of pictures, as the command line spells them and as models of several are told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from diffusion_runtime.errors import InputError

PATTERN = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class Size(NamedTuple):
    """Width and height in pixels, in the order in which they are written: 768x512 is wider than high."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def function(self) -> str:
        """What the function for this size is called in a package of several."""
        return f"size_{self}"


def listed(sizes: Sequence[Size]) -> str:
    """``64x64, 96x64 and 64x128``."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} and {last}" if others else last


def parse_size(text: str) -> Size:
    """``768x512``. Raises InputError for anything else."""
    found = PATTERN.fullmatch(text.strip().lower())
    if found is None:
        raise InputError(f"size {text!r}: expected WIDTHxHEIGHT in pixels, as 768x512")
    return Size(int(found[1]), int(found[2]))
