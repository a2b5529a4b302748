"""What the C library does with memory that is freed. Only glibc has these calls; elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import os
from typing import Any

HELD_ELSEWHERE = 2**28
"""Bytes from which on memory comes from the system and goes back to it at once: holes of that size would hurt."""
HELD_AT_MOST = 2**29
"""Bytes at the end of the heap that are kept for the next tensors."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed() -> None:
    """Keep freed memory for the next tensors of this process and of those that it starts, until `release`, unless
    the user has said otherwise (``MALLOC_…``, ``GLIBC_TUNABLES``): glibc gives 32 MB and more back each time, and
    the system clears its pages anew."""
    set_option = _function("mallopt")
    if set_option is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    # Before 2.35 glibc refuses more than 32 MB here, and is left as it is.
    if set_option(_M_MMAP_THRESHOLD, HELD_ELSEWHERE):
        set_option(_M_TRIM_THRESHOLD, HELD_AT_MOST)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(HELD_ELSEWHERE)
        os.environ["MALLOC_TRIM_THRESHOLD_"] = str(HELD_AT_MOST)


def release() -> None:
    """Give memory that was freed back to the system. glibc keeps what other threads allocated: a gigabyte here."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
