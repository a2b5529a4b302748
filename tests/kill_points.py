"""Processes that are killed at each step at which they change the disk, and processes that race."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from diffusion_runtime.errors import DiffusionError

TESTS = Path(__file__).resolve().parent
Answer = TypeVar("Answer")

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "ctypes.dlsym")
"""Python's audit events, raised before each change; the last stands before two folders are exchanged."""


class Forks:
    """A process in which `kill_at` and `race` fork: one that has imported little beside what it runs. To fork the
    tests' own takes longer than most of what is done in these processes, as it has a million objects.

    What it runs is pickled: functions of modules, and `functools.partial` of them. ``python`` runs it."""

    def __init__(self, python: str | Path = sys.executable, **environment: str) -> None:
        self._here, there = Pipe()
        paths = [TESTS, TESTS.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [python, "-c", f"from kill_points import serve; serve({there.fileno()})"],
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, paths))},
            pass_fds=[there.fileno()],
        )
        there.close()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._process.wait()

    def call(self, function: Callable[..., Answer], *given: object) -> Answer:
        """What the function answers there, or raises."""
        self._here.send((function, given))
        answer, error = self._here.recv()
        if error is not None:
            raise error
        return answer  # type: ignore[no-any-return]

    def kill_at(self, act: Callable[[], object], step: int) -> bool:
        return self.call(kill_at, act, step)

    def race(self, *acts: Callable[[], object]) -> list[int]:
        return self.call(race, *acts)


def serve(number: int) -> None:
    """What `Forks` runs: answer over the connection of that number until the other end is closed."""
    connection: Connection[Any, Any] = Connection(number)
    while True:
        try:
            function, given = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*given), None))
        except BaseException as error:
            connection.send((None, error))


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
    gc.freeze()  # or a collection would look at all that is imported, and copy it
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
