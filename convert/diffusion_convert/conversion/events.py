"""What `convert` tells of while it works."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class Phase(enum.StrEnum):
    """What is done now: first with the checkpoint, then with each component, then with all together."""

    OPEN = "open"
    FAMILY = "family"
    NOTE = "note"
    COMPONENTS = "components"
    REFERENCE = "reference"
    LOAD = "load"
    TRACE = "trace"
    CONVERT = "convert"
    SAVE = "save"
    VERIFY = "verify"
    PALETTIZE = "palettize"
    CUT = "cut"
    COMPILE = "compile"
    ZIP = "zip"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Event:
    """``phase`` of a ``part`` ("unet-original"; "" for the whole) is done to ``fraction``, from 0 to 1.

    ``text`` says which family (FAMILY), what the user should know (NOTE) or which variant (COMPILE)."""

    part: str
    phase: Phase
    fraction: float
    text: str = ""


Progress = Callable[[Event], None]
