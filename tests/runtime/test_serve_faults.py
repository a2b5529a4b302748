"""What goes wrong around a server: clients that leave or send slowly, large bodies, workers that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from diffusion_runtime.loading import load_pipeline
from diffusion_runtime.png_record import Settings
from diffusion_runtime.serve import server
from diffusion_runtime.serve.guard import Guard, Rules
from diffusion_runtime.serve.orders import Order, Picture, Progress, Wanted
from diffusion_runtime.serve.worker import Cancel, Done, Setup, _Worker
from serving import Served, pixels, score, serving

PROMPT = "a private prompt"
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")


@pytest.fixture(scope="module")
def served(toy_folder: Path, forked_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with serving(log, f"toy={toy_folder}", python=forked_python) as one:
        yield one


@dataclass
class Pipe:
    """A worker's end of its pipe. ``cancel_after`` so many steps, a Cancel of the order comes in."""

    order: str
    cancel_after: int
    sent: list[object] = field(default_factory=list)
    coming: deque[object] = field(default_factory=deque)

    def send(self, message: object) -> None:
        self.sent.append(message)
        steps = [one for one in self.sent if isinstance(one, Progress)]
        if isinstance(message, Progress) and len(steps) == self.cancel_after:
            self.coming.extend((Cancel("of somebody else"), Cancel(self.order)))

    def poll(self) -> bool:
        return bool(self.coming)

    def recv(self) -> object:
        return self.coming.popleft()


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_worker_stops_within_a_step(toy_folder: Path, steps: int) -> None:
    """Seven is in the second picture: the first is finished and kept."""
    order = Order(tuple(Wanted(Settings(prompt="a", steps=4, scheduler="ddim", seed=1)) for _ in range(3)))
    pipe: Any = Pipe(order.id, steps)
    worker = _Worker(Setup(str(toy_folder), "toy", {"backend": "torch"}, 1), pipe, lambda: None)
    assert worker.make(order) == Done(cancelled=True)
    assert sum(isinstance(one, Progress) for one in pipe.sent) == steps
    assert sum(isinstance(one, Picture) for one in pipe.sent) == steps // 4


def test_a_client_that_goes_away_stops_its_pictures(served: Served) -> None:
    before, all_steps = served.metric("step_seconds_count"), 10 * 150
    long = score(["prompt"], *["a"] * 10, num_inference_steps=150)
    with pytest.raises(httpx.ReadTimeout):
        served.client.post("/score", json=long, timeout=httpx.Timeout(300, read=0.1))
    assert served.client.post("/score", json=score(["prompt"], "b")).status_code == 200
    made = served.metric("step_seconds_count") - before
    assert made < all_steps, "the next one waited for all steps"
    assert served.metric("queue") == 0


@needs_proc
def test_a_worker_that_is_killed_under_load_loses_no_request(served: Served, toy_folder: Path) -> None:
    pipeline, deaths = load_pipeline(toy_folder, "torch"), served.metric("worker_deaths_total")

    def ask(seed: int) -> bytes:
        answer = served.client.post("/score", json=score(["prompt"], PROMPT, seed=seed, num_inference_steps=40))
        assert answer.status_code == 200, answer.text
        return pixels(answer.json()[0]["generated_image"])

    with ThreadPoolExecutor(6) as threads:
        waiting = [threads.submit(ask, seed) for seed in range(12)]
        while not any(one.done() for one in waiting):
            time.sleep(0.01)
        for pid in served.workers:
            os.kill(pid, signal.SIGKILL)
        found = [one.result() for one in waiting]
    assert served.metric("worker_deaths_total") == deaths + 1
    for seed, picture in enumerate(found):
        assert picture == pipeline(PROMPT, num_inference_steps=40, seed=seed).images[0].tobytes()


def peak_memory(pid: int) -> int:
    """Bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmHWM"))


@needs_proc
@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_of_json_are_not_kept(served: Served, chunked: bool) -> None:
    whole = b'{"input_data": {"columns": ["prompt"], "data": ["' + b"a" * (100 << 20) + b'"]}}'
    pieces = (whole[at : at + (1 << 20)] for at in range(0, len(whole), 1 << 20))
    before = peak_memory(served.pid)
    headers = {"content-type": "application/json"}
    answer = served.client.post("/score", content=pieces if chunked else whole, headers=headers)
    assert answer.status_code == 413 and "32 MiB" in answer.text
    assert peak_memory(served.pid) - before < 48 << 20
    assert served.client.post("/score", json=score(["prompt"], "a")).status_code == 200


HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\n"


def test_a_hundred_slow_senders_hinder_nobody(served: Served) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port))) for _ in range(100)]
        for number, one in enumerate(slow):
            one.sendall(HEAD + (b"Content-Length: 100\r\n\r\n{" if number % 2 else b"X-Slow: "))
        for byte in b"abc":
            for one in slow:
                one.sendall(bytes([byte]))
            assert served.client.post("/score", json=score(["prompt"], "a")).status_code == 200


def test_a_body_that_comes_too_slowly_is_408() -> None:
    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def run() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(*_: Any) -> None:
            raise AssertionError("nobody has sent it a body")

        headers = [(b"host", b"localhost"), (b"content-length", b"10")]
        scope = {"type": "http", "path": "/score", "headers": headers}
        await Guard(app, Rules(seconds=0.05))(scope, never, send)
        return sent

    start, body = asyncio.run(run())
    assert start["status"] == 408 and b"within 0.05 s" in body["body"]


@pytest.mark.parametrize("earlier", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_comes_too_slowly_ends_the_connection(earlier: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)

    async def app(_: Any, __: Any, send: Callable[..., Any]) -> None:
        await asyncio.sleep(0.8)  # an answer may take longer than a head
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def run() -> tuple[bytes, float]:
        loop, config = asyncio.get_running_loop(), uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        listening = await loop.create_server(lambda: server.Connection(config, ServerState(), {}), "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(earlier)
        answer = await reader.readuntil(b"ok") if earlier else b""
        begun = time.monotonic()
        sending, rest = asyncio.create_task(_trickle(writer)), b""
        with suppress(ConnectionResetError):  # what was sent last may not have been read when it was closed
            rest = await asyncio.wait_for(reader.read(), 30)
        sending.cancel()
        writer.close()
        listening.close()
        return answer + rest, time.monotonic() - begun

    answer, seconds = asyncio.run(run())
    assert answer.startswith(b"HTTP/1.1 200") if earlier else answer == b""
    assert 0.4 < seconds < 20


async def _trickle(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"X-Slow: ")
    while True:
        writer.write(b"a")
        await asyncio.sleep(0.05)
