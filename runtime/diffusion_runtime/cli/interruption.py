"""Ctrl-C, whatever a library makes of it.

Python raises KeyboardInterrupt between any two instructions, and libraries make other errors of it: safetensors one
of a damaged file, torch one of its mode stack, numpy one of an import. In a finalizer it is lost. So it is noted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_arrived: list[int] = []
"""The signals: no lock, as a second one may come while the first is noted."""


def _interrupt(number: int, __: FrameType | None) -> None:
    _arrived.append(number)
    raise KeyboardInterrupt


def heed() -> None:
    """Remember Ctrl-C from now on, unless this process ignores it, as in the background."""
    _arrived.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def check() -> None:
    """Raises KeyboardInterrupt where Ctrl-C has arrived: also where that was lost."""
    if _arrived:
        raise KeyboardInterrupt


@contextmanager
def seen() -> Iterator[None]:
    """In this context, whatever error follows Ctrl-C is KeyboardInterrupt. After it, it has been heeded."""
    try:
        yield
    except Exception as error:
        if not _arrived:
            raise
        raise KeyboardInterrupt from error
    finally:
        _arrived.clear()
