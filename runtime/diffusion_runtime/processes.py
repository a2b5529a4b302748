"""Child processes that hold models: started afresh, spoken to over a pipe, gone when their parent is."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """A process and our end of the pipe to it."""

    process: Any
    connection: Connection

    @property
    def end(self) -> str:
        """How it ended, in words."""
        self.process.join()
        code = self.process.exitcode
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"by {signal.Signals(-code).name}"
        return f"with exit code {code}"

    def send(self, message: object) -> None:
        with suppress(OSError):  # it is gone: whoever listens hears that
            self.connection.send(message)

    def stop(self) -> None:
        """End it now. What it was writing is in a work folder, which the next run sweeps."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def peak_memory() -> int:
    """The most memory that this process has had so far, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, Linux KiB


def start(work: Callable[..., None], *arguments: object) -> Child:
    """A process that runs ``work(*arguments, connection, alive)``; ``alive()`` ends it when its parent is gone, and
    Ctrl-C is for the parent alone."""
    # "spawn": a copy of a process in which torch or Core ML has started threads may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(work, arguments, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()  # else its end would not be noticed
    return Child(process, ours)


def _run(work: Callable[..., None], arguments: tuple[object, ...], connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def alive() -> None:
        if os.getppid() != parent:  # killed: nobody would hear the answer, and the next run may need the memory
            os._exit(1)

    with suppress(EOFError, OSError):
        work(*arguments, connection, alive)
