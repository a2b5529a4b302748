"""Workers that are actors of a Ray cluster: one for each worker, wherever the cluster has room."""

from __future__ import annotations

import os
import secrets
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_runtime.batch.local import TRIES
from diffusion_runtime.batch.tasks import Answer, Task
from diffusion_runtime.batch.worker import Setup, Worker
from diffusion_runtime.errors import DiffusionError, InputError, InstallationError

SECONDS_TO_ANSWER = 10.0


def connect(address: str) -> Any:
    """Ray, connected: "local" starts one here, "auto" finds the one that runs here, anything else is an address.

    Raises InstallationError where Ray is missing, InputError where no cluster answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InstallationError("--ray needs Ray: run `pip install 'coreml-sd[cluster]'`") from error
    if ray.is_initialized():
        return ray
    _check_answers(address)
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=True, logging_level="ERROR", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--ray {address}: no cluster answers there: {reason}") from error
    return ray


def _check_answers(address: str) -> None:
    """Raise InputError where nobody listens at an address: Ray itself would try for minutes, and say much."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--ray {address}: expected local, auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: no cluster answers there: {error}") from error


def cores(ray: Any) -> int:
    """How many CPUs the cluster has."""
    return int(ray.cluster_resources().get("CPU", 1))


@dataclass(slots=True)
class RayWorkers:
    """An actor for each setup. Rows whose actor or machine dies are given to a new one, `TRIES` times in all."""

    ray: Any
    setups: Sequence[Setup]

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """As `LocalWorkers.run`."""
        waiting = deque(tasks)
        tries: dict[int, int] = {}
        actors = [self._start(setup) for setup in self.setups[: max(1, len(tasks))]]
        working: dict[Any, tuple[int, Task]] = {}
        idle = list(range(len(actors)))
        try:
            while waiting or working:
                while idle and waiting:
                    index, task = idle.pop(), waiting.popleft()
                    working[actors[index].make.remote(task)] = index, task
                finished, _ = self.ray.wait(list(working), num_returns=1)
                index, task = working.pop(finished[0])
                try:
                    yield self.ray.get(finished[0])
                except self.ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    raise (cause if isinstance(cause, DiffusionError) else error) from None
                except self.ray.exceptions.RayActorError as error:
                    answer = self._died(task, tries, error, waiting)
                    actors[index] = self._start(self.setups[index])
                    if answer is not None:
                        yield answer
                idle.append(index)
        finally:
            for actor in actors:
                self.ray.kill(actor)

    def _died(self, task: Task, tries: dict[int, int], error: Any, waiting: deque[Task]) -> Answer | None:
        """Raises the DiffusionError of an actor that could not load its models."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, DiffusionError):
            raise cause
        tries[task.number] = tries.get(task.number, 0) + 1
        if tries[task.number] < TRIES:
            waiting.appendleft(task)
            return None
        return Answer(task, error=f"its worker died {TRIES} times: {' '.join(str(error).split())[:200]}")

    def _start(self, setup: Setup) -> Any:
        name = f"coreml-sd-{secrets.token_hex(8)}"  # so that a list of actors tells whose they are
        return self.ray.remote(num_cpus=setup.threads, max_restarts=0)(Worker).options(name=name).remote(setup)
