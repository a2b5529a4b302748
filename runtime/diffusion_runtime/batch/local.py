"""Workers that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from diffusion_runtime.batch.tasks import Answer, Task
from diffusion_runtime.batch.worker import Setup, Worker
from diffusion_runtime.errors import DiffusionError, InstallationError

TRIES = 3
"""How often a row is begun before it is given up, where its worker dies each time."""


@dataclass(slots=True)
class _Process:
    setup: Setup
    process: Any
    connection: Connection
    is_ready: bool = False
    task: Task | None = None


@dataclass(slots=True)
class LocalWorkers:
    """A process for each setup. Rows whose worker dies are given to a new one, `TRIES` times in all."""

    setups: Sequence[Setup]
    running: list[_Process] = field(default_factory=list)
    tries: dict[int, int] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """The answers, in the order in which they come. Raises the DiffusionError of a worker that cannot load its
        models or write its pictures; when the caller stops listening, the workers are stopped."""
        waiting, left = deque(tasks), len(tasks)
        self.running = [_start(setup) for setup in self.setups[: max(1, len(tasks))]]
        try:
            while left:
                for one in self.running:
                    if one.is_ready and one.task is None and waiting:
                        one.task = waiting.popleft()
                        _send(one, one.task)
                for connection in wait([one.connection for one in self.running]):
                    one = next(one for one in self.running if one.connection is connection)
                    answer = self._heard(one, waiting)
                    if answer is not None:
                        left -= 1
                        yield answer
        finally:
            for one in self.running:
                _stop(one)

    def _heard(self, one: _Process, waiting: deque[Task]) -> Answer | None:
        try:
            message = one.connection.recv()
        except (EOFError, OSError):
            return self._died(one, waiting)
        if isinstance(message, DiffusionError):
            raise message
        if isinstance(message, Answer):
            one.task = None
            return message
        one.is_ready = True
        return None

    def _died(self, one: _Process, waiting: deque[Task]) -> Answer | None:
        """Start another worker in the place of one that is gone."""
        one.process.join()
        how = _how(one.process.exitcode)
        task, was_ready = one.task, one.is_ready
        if not was_ready:
            raise InstallationError(
                f"{one.setup.models}: a worker was ended {how} while it loaded the models; with too little memory, "
                "use fewer --workers, or --reduce-memory"
            )
        self.running[self.running.index(one)] = _start(one.setup)
        one.connection.close()
        if task is None:
            return None
        self.tries[task.number] = self.tries.get(task.number, 0) + 1
        if self.tries[task.number] < TRIES:
            waiting.appendleft(task)
            return None
        return Answer(
            task, error=f"its worker was ended {how}, {TRIES} times; with too little memory, use fewer --workers"
        )


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"


def _start(setup: Setup) -> _Process:
    # "spawn": a copy of a process in which torch or Core ML has started threads may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(setup, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()  # else its end would not be noticed
    return _Process(setup, process, ours)


def _send(one: _Process, task: Task) -> None:
    with suppress(OSError):  # it is gone: that is heard next
        one.connection.send(task)


def _stop(one: _Process) -> None:
    one.connection.close()
    one.process.kill()  # what it was writing is in a work folder, which the next run sweeps
    one.process.join()


def _work(setup: Setup, connection: Connection, parent: int) -> None:
    """A worker's life. Ctrl-C is for the process that started it, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def alive() -> None:
        if os.getppid() != parent:  # killed: nobody would hear the answer, and the next run may need the memory
            os._exit(1)

    with suppress(EOFError, OSError):
        try:
            worker = Worker(setup)
            connection.send("ready")
            while True:
                connection.send(worker.make(connection.recv(), alive))
        except DiffusionError as error:
            connection.send(error)
