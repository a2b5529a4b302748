"""The queue, the workers and the memory budget. Everything here runs on the event loop; what blocks is in threads.

An order waits in the queue of its set of models and is made by that set's worker. Workers are started at once where
the budget has room, else when they are first needed; the one that was used longest ago is ended where it has not.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from diffusion_runtime import processes
from diffusion_runtime.errors import DiffusionError
from diffusion_runtime.processes import Child
from diffusion_runtime.serve.metrics import Metrics
from diffusion_runtime.serve.orders import (
    About,
    Busy,
    Cancelled,
    Closing,
    Lost,
    Order,
    Picture,
    Progress,
    Refused,
)
from diffusion_runtime.serve.worker import Cancel, Done, Setup, work

TRIES = 2
"""How often an order is begun where its worker dies."""
FIRST_GUESS = 30.0
"""Seconds that an order may take, before any was made."""

OnProgress = Callable[[Progress], None]


@dataclass(slots=True, eq=False)
class Waiting:
    """An order in a queue or in work, and who waits for it."""

    order: Order
    answer: asyncio.Future[tuple[Picture, ...]]
    on_progress: OnProgress | None = None
    pictures: list[Picture] = field(default_factory=list)
    progress: Progress | None = None
    since: float = field(default_factory=time.monotonic)
    tries: int = 0

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(slots=True, eq=False)
class ModelSet:
    """One set of models: its queue and, while it is loaded, its worker."""

    setup: Setup
    queue: deque[Waiting] = field(default_factory=deque)
    child: Child | None = None
    about: About | None = None
    current: Waiting | None = None
    used: float = 0.0
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Engine:
    """Several sets of models behind one queue of at most ``most_waiting`` orders. ``budget`` in bytes is for the
    workers' memory together; None: no limit."""

    def __init__(self, setups: Sequence[Setup], most_waiting: int = 32, budget: int | None = None) -> None:
        self.sets = {setup.name: ModelSet(setup) for setup in setups}
        self.metrics, self.most_waiting, self.budget = Metrics(), most_waiting, budget
        self.is_closing = False
        self.on_drain: list[Callable[[], None]] = []
        self._loading = asyncio.Lock()  # two that are loaded at once would each count on the same free memory
        self._threads = ThreadPoolExecutor(2 * len(setups) + 2)  # a worker that is listened to has one to itself
        self._tasks: list[asyncio.Task[None]] = []
        self._seconds: float | None = None

    async def _in_thread(self, blocking: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, blocking, *arguments)

    @property
    def default(self) -> ModelSet:
        return next(iter(self.sets.values()))

    @property
    def waiting(self) -> int:
        return sum(len(one.queue) for one in self.sets.values())

    @property
    def is_ready(self) -> bool:
        return not self.is_closing and any(one.about is not None for one in self.sets.values())

    async def start(self) -> None:
        """Load the models, as many sets as the budget has room for. Raises the DiffusionError of models that cannot
        be loaded."""
        for one in self.sets.values():
            if self.budget is None or self._memory(self.sets.values()) < self.budget:
                await self._load(one)
        self._tasks = [asyncio.create_task(self._run(one)) for one in self.sets.values()]

    async def about(self, name: str | None) -> About:
        """What a set of models is; it is loaded where it has not been yet."""
        one = self.find(name)
        if one.about is None:
            await self._load(one)
        if one.about is None:
            raise Lost(f"the models {one.setup.name} cannot be loaded")
        return one.about

    def find(self, name: str | None) -> ModelSet:
        """Raises Refused for a name that no set has."""
        if name is None:
            return self.default
        if name not in self.sets:
            raise Refused(f"unknown model {name!r}: expected one of {', '.join(self.sets)}")
        return self.sets[name]

    def put(self, order: Order, name: str | None = None, on_progress: OnProgress | None = None) -> Waiting:
        """Queue an order. Raises Refused, Busy where the queue is full, Closing where the server goes down."""
        one = self.find(name)
        if self.is_closing:
            raise Closing("the server is going down")
        if self.waiting >= self.most_waiting:
            raise Busy(max(1, round((self._seconds or FIRST_GUESS) * self.waiting / len(self.sets))))
        waiting = Waiting(order, asyncio.get_running_loop().create_future(), on_progress)
        one.queue.append(waiting)
        self.metrics.waiting.set(self.waiting)
        one.wake.set()
        return waiting

    def ahead(self, order: Order) -> int | None:
        """How many orders come before one that waits; None where it does not wait."""
        for one in self.sets.values():
            for place, waiting in enumerate(one.queue):
                if waiting.order is order:
                    return place + (one.current is not None)
        return None

    def cancel(self, waiting: Waiting, why: Exception | None = None) -> None:
        """Take an order out of its queue, or stop it within a step."""
        for one in self.sets.values():
            if waiting in one.queue:
                one.queue.remove(waiting)
                self.metrics.waiting.set(self.waiting)
            if one.current is waiting and one.child is not None:
                one.child.send(Cancel(waiting.order.id))
        waiting.fail(why or Cancelled(tuple(waiting.pictures)))
        with suppress(Exception):
            waiting.answer.exception()  # whoever waited may be gone: then nobody asks for it

    def drain(self) -> None:
        """Begin nothing new: what runs is finished, what waits is refused."""
        self.is_closing = True
        for one in self.sets.values():
            while one.queue:
                one.queue.popleft().fail(Closing("the server is going down"))
            one.wake.set()
        self.metrics.waiting.set(0)
        for call in self.on_drain:
            call()

    async def stop(self) -> None:
        """End the workers."""
        self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self.sets.values():
            await self._unload(one)

    def _memory(self, sets: Iterable[ModelSet]) -> int:
        return sum(one.about.memory for one in sets if one.about is not None)

    async def _run(self, one: ModelSet) -> None:
        while True:
            one.wake.clear()
            while one.queue:
                waiting = one.queue.popleft()
                self.metrics.waiting.set(self.waiting)
                one.current = waiting
                try:
                    await self._make(one, waiting)
                finally:
                    one.current = None
                    one.used = time.monotonic()
            await one.wake.wait()

    async def _make(self, one: ModelSet, waiting: Waiting) -> None:
        """One order, from the queue to its answer; with a new worker where its first one dies."""
        name, begun = one.setup.name, time.monotonic()
        self.metrics.stages.labels(name, "wait").observe(begun - waiting.since)
        while not waiting.answer.done():
            waiting.tries += 1
            try:
                if one.child is None:
                    await self._load(one)
                if one.child is None or waiting.answer.done():
                    return
                waiting.pictures.clear()
                done = await self._listen(one, one.child, waiting)
            except DiffusionError as error:
                waiting.fail(Lost(f"the models cannot be loaded: {error}"))
                return
            # A worker that dies takes no other order with it: this one is begun again, with a new worker.
            except (EOFError, OSError):
                how = "early" if one.child is None else await self._in_thread(lambda child: child.end, one.child)
                await self._unload(one)
                self.metrics.deaths.labels(name).inc()
                if waiting.tries >= TRIES:
                    waiting.fail(Lost(f"its worker was ended {how}, {TRIES} times"))
                continue
            self._answer(waiting, done)
            if done.seconds:
                self._seconds = done.seconds if self._seconds is None else 0.8 * self._seconds + 0.2 * done.seconds
                self.metrics.stages.labels(name, "make").observe(done.seconds)

    def _answer(self, waiting: Waiting, done: Done) -> None:
        if done.refused is not None:
            waiting.fail(Refused(done.refused))
        elif done.failed is not None:
            waiting.fail(RuntimeError(done.failed))
        elif done.cancelled:
            waiting.fail(Cancelled(tuple(waiting.pictures)))
        elif not waiting.answer.done():
            for picture in waiting.pictures:
                self.metrics.pictures.labels(str(picture.flagged).lower()).inc()
            waiting.answer.set_result(tuple(waiting.pictures))

    async def _listen(self, one: ModelSet, child: Child, waiting: Waiting) -> Done:
        """Send an order and hear its end. Raises EOFError or OSError where the worker dies."""
        child.send(waiting.order)
        last = time.monotonic()
        while True:
            message = await self._in_thread(child.connection.recv)
            if isinstance(message, Done):
                return message
            if isinstance(message, Picture):
                waiting.pictures.append(message)
            elif isinstance(message, Progress):
                now = time.monotonic()
                self.metrics.steps.labels(one.setup.name).observe(now - last)
                last, waiting.progress = now, message
                if waiting.on_progress is not None:
                    waiting.on_progress(message)

    async def _load(self, one: ModelSet) -> None:
        """Start a worker, and end others where memory is short. Raises DiffusionError for models that cannot be
        loaded."""
        async with self._loading:
            if one.child is not None:
                return
            await self._make_room(one)
            child = await self._in_thread(processes.start, work, one.setup)
            try:
                told = await self._in_thread(child.connection.recv)
            except (EOFError, OSError):
                how = await self._in_thread(lambda: child.end)
                raise DiffusionError(
                    f"{one.setup.models}: the worker was ended {how} while it loaded the models: is there memory?"
                ) from None
            except asyncio.CancelledError:  # the server goes down: the thread that listens would keep it
                child.stop()
                raise
            if isinstance(told, DiffusionError):
                child.stop()
                raise told
            one.child, one.about, one.used = child, told, time.monotonic()
            self.metrics.loaded.labels(one.setup.name).set(1)
            self.metrics.stages.labels(one.setup.name, "load").observe(told.seconds)

    async def _make_room(self, wanted: ModelSet) -> None:
        """End the workers that were used longest ago until the budget has room for one more of the size that this
        one had, or, before it was ever loaded, of the largest."""
        if self.budget is None:
            return
        known = [one.about.memory for one in self.sets.values() if one.about is not None]
        need = wanted.about.memory if wanted.about is not None else max(known, default=0)
        while loaded := [one for one in self.sets.values() if one.child is not None]:
            if self._memory(loaded) + need <= self.budget:
                return
            idle = [one for one in loaded if one.current is None]
            if idle:
                await self._unload(min(idle, key=lambda one: one.used))
            else:
                await _until_idle(loaded)

    async def _unload(self, one: ModelSet) -> None:
        child, one.child = one.child, None
        if child is not None:
            await self._in_thread(child.stop)
            self.metrics.loaded.labels(one.setup.name).set(0)


async def _until_idle(sets: Sequence[ModelSet]) -> None:
    """Wait until one of them has nothing to do, or has lost its worker: a new one waits for whoever waits here."""
    while all(one.current is not None and one.child is not None for one in sets):
        await asyncio.sleep(0.05)
