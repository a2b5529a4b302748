"""Workers that are processes of this machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from diffusion_runtime import processes
from diffusion_runtime.batch.tasks import Answer, Task
from diffusion_runtime.batch.worker import Setup, Worker
from diffusion_runtime.errors import DiffusionError, InstallationError
from diffusion_runtime.processes import Child

TRIES = 3
"""How often a row is begun before it is given up, where its worker dies each time."""


@dataclass(slots=True)
class _Running:
    setup: Setup
    child: Child
    is_ready: bool = False
    task: Task | None = None


@dataclass(slots=True)
class LocalWorkers:
    """A process for each setup. Rows whose worker dies are given to a new one, `TRIES` times in all."""

    setups: Sequence[Setup]
    running: list[_Running] = field(default_factory=list)
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
                        one.child.send(one.task)
                for connection in wait([one.child.connection for one in self.running]):
                    one = next(one for one in self.running if one.child.connection is connection)
                    answer = self._heard(one, waiting)
                    if answer is not None:
                        left -= 1
                        yield answer
        finally:
            for one in self.running:
                one.child.stop()

    def _heard(self, one: _Running, waiting: deque[Task]) -> Answer | None:
        try:
            message = one.child.connection.recv()
        except (EOFError, OSError):
            return self._died(one, waiting)
        if isinstance(message, DiffusionError):
            raise message
        if isinstance(message, Answer):
            one.task = None
            return message
        one.is_ready = True
        return None

    def _died(self, one: _Running, waiting: deque[Task]) -> Answer | None:
        """Start another worker in the place of one that is gone."""
        how, task = one.child.end, one.task
        if not one.is_ready:
            raise InstallationError(
                f"{one.setup.models}: a worker was ended {how} while it loaded the models; with too little memory, "
                "use fewer --workers, or --reduce-memory"
            )
        self.running[self.running.index(one)] = _start(one.setup)
        one.child.stop()
        if task is None:
            return None
        self.tries[task.number] = self.tries.get(task.number, 0) + 1
        if self.tries[task.number] < TRIES:
            waiting.appendleft(task)
            return None
        reason = f"its worker was ended {how}, {TRIES} times; with too little memory, use fewer --workers"
        return Answer(task, error=reason)


def _start(setup: Setup) -> _Running:
    return _Running(setup, processes.start(_work, setup))


def _work(setup: Setup, connection: Connection, alive: Callable[[], None]) -> None:
    """A worker's life."""
    try:
        worker = Worker(setup)
        connection.send("ready")
        while True:
            connection.send(worker.make(connection.recv(), alive))
    except DiffusionError as error:
        connection.send(error)
