"""The engine of `coreml-sd serve`: what is rare between a queue and its workers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from diffusion_runtime import processes
from diffusion_runtime.picture_size import Size
from diffusion_runtime.png_record import Settings
from diffusion_runtime.serve.engine import Engine, ModelSet, Waiting
from diffusion_runtime.serve.orders import About, Lost, Order, Wanted
from diffusion_runtime.serve.worker import Setup

SECONDS = 10.0


@dataclass
class Silent:
    """A worker's place: it says nothing, and can be stopped."""

    connection: Connection
    its: Connection

    def stop(self) -> None:
        self.its.close()


def engine(*names: str, budget: int | None = None) -> Engine:
    return Engine([Setup(f"nowhere/{name}", name, {}) for name in names], budget=budget)


def order() -> Order:
    return Order((Wanted(Settings(prompt="a")),))


def load(one: ModelSet, memory: int) -> None:
    """As `Engine` leaves a set whose worker has said what it is."""
    child: Any = Silent(*Pipe())
    one.child = child
    one.about = About(one.setup.name, "sd1", "original", (Size(64, 64),), (), (), True, memory, 0.0)


def test_models_that_wait_for_room_do_not_wait_for_a_worker_that_has_died() -> None:
    async def run() -> None:
        both = engine("busy", "wanted", budget=10)
        busy, wanted = both.sets.values()
        load(busy, memory=10)
        busy.current = Waiting(order(), asyncio.get_running_loop().create_future())
        making = asyncio.create_task(both._make_room(wanted))
        await asyncio.sleep(0.1)
        assert not making.done(), "its worker is in work"
        busy.child = None  # killed; its order waits until `_loading` is free, which `wanted` holds
        await asyncio.wait_for(making, SECONDS)

    asyncio.run(run())


def test_a_worker_that_loads_is_ended_when_the_server_goes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Silent(*Pipe())
    monkeypatch.setattr(processes, "start", lambda *_: child)

    async def run() -> None:
        one = engine("a")
        loading = asyncio.create_task(one.start())
        await asyncio.sleep(0.1)
        assert not loading.done() and not child.its.closed
        loading.cancel()
        await asyncio.wait({loading}, timeout=SECONDS)
        assert child.its.closed

    try:
        asyncio.run(run())
    finally:
        child.its.close()  # else the thread that listens would keep the tests


def test_an_order_is_given_up_where_no_worker_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(processes, "start", none)

    async def run() -> None:
        one = engine("a")
        waiting = one.put(order())
        await asyncio.wait_for(one._make(one.default, waiting), SECONDS)
        with pytest.raises(Lost, match="2 times"):
            waiting.answer.result()

    asyncio.run(run())
