"""How Python's garbage collector works while models are converted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG_OBJECTS = 20_000
"""How many new objects start a collection. Python's own 700 are made by one or two operations of a program."""


@contextmanager
def new_garbage_only() -> Iterator[None]:
    """In this context, the collector looks only at objects that were made in it, and less often.

    torch, diffusers and coremltools hold a million objects that live as long as the process. A conversion collects
    dozens of times, as networks and programs are cycles that hold files mapped, and each time would look at them
    all. What a caller has frozen stays frozen; then nothing else is.
    """
    theirs, thresholds = gc.get_freeze_count(), gc.get_threshold()
    if not theirs:
        gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not theirs:
            gc.unfreeze()
