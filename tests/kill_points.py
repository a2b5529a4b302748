"""Processes that are killed at each step at which they change the disk, and processes that race."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context

from diffusion_runtime.errors import DiffusionError

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "ctypes.dlsym")
"""Python's audit events, raised before each change; the last stands before two folders are exchanged."""


def kill_at(act: Callable[[], object], step: int) -> bool:
    """Whether ``act`` in a process of its own came to its ``step``-th change of the disk, and was killed before it.
    Raises AssertionError where it fails before."""
    child = get_context("fork").Process(target=_killed, args=(act, step))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), child.exitcode
    return child.exitcode != 0


def race(*acts: Callable[[], object]) -> list[int]:
    """Run all at once, each in a process of its own; their exit codes: 0, 2 for an error of ours, 1 for others."""
    context = get_context("fork")
    barrier = context.Barrier(len(acts))
    children = [context.Process(target=_raced, args=(act, barrier)) for act in acts]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode or 0 for child in children]


def _killed(act: Callable[[], object], step: int) -> None:
    gc.freeze()  # or a collection would look at all that the tests have made, and copy it
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event in CHANGES:
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    act()
    os._exit(0)


def _raced(act: Callable[[], object], barrier: object) -> None:
    gc.freeze()
    barrier.wait()  # type: ignore[attr-defined]
    try:
        act()
    except DiffusionError:
        os._exit(2)
    os._exit(0)
