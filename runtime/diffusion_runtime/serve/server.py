"""Runs the application until SIGTERM or Ctrl-C: what is being made is finished, what waits is refused."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffusion_runtime.backends import resolve
from diffusion_runtime.bundle.find import find
from diffusion_runtime.errors import InputError
from diffusion_runtime.serve.app import build
from diffusion_runtime.serve.engine import Engine
from diffusion_runtime.serve.guard import LOCAL_NAMES, App, Rules, is_loopback
from diffusion_runtime.serve.service import Service
from diffusion_runtime.serve.worker import Setup

FOR_BROWSERS = 'Basic realm="coreml-sd: any name, and the key as the password"'
"""A browser then asks for the key."""
MIN_KEY = 16  # characters
_MOST_KEY_BYTES = 1 << 20  # a device has no end
HEAD_SECONDS = 30.0
"""In which the head of a request has to come."""


class Connection(H11Protocol):
    """uvicorn's, which waits for the head of a request as long as it takes: slow senders could take every file that
    the system lets the server open. Bodies are the guard's."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """One clock from the head's first byte to its last; after an answer, uvicorn's own runs."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self.timer is None:
            self.timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class _Server(uvicorn.Server):
    """uvicorn's, without its handlers of signals, which end the process by the signal in the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    service: Service,
    rules: Rules,
    listening: socket.socket,
    told: Callable[[], None],
    ui: bool = False,
) -> bool:
    """Serve until a signal; ``told()`` when the models are there. True where it was Ctrl-C. Raises the
    DiffusionError of models that cannot be loaded."""
    return asyncio.run(_serve(service.engine, build(service, rules, ui), listening, told))


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot be listened to: {reason}") from error


async def _serve(engine: Engine, app: App, listening: socket.socket, told: Callable[[], None]) -> bool:
    config = uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",  # "auto" would go on where the start of a part fails
        timeout_keep_alive=30,
    )
    server = _Server(config)
    interrupted = False

    def end(by_user: bool) -> None:
        nonlocal interrupted
        interrupted = interrupted or by_user
        engine.drain()
        if server.should_exit and by_user:
            server.force_exit = True  # a second Ctrl-C
        server.should_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end, False)
    loop.add_signal_handler(signal.SIGINT, end, True)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        loading = asyncio.create_task(engine.start())
        await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            told()
        await serving
    finally:
        server.should_exit = True
        await serving
        await engine.stop()
    return interrupted


def setups(models: Sequence[str], loading: Mapping[str, Any], threads: int | None) -> list[Setup]:
    """A set of models for each FOLDER or NAME=FOLDER. Raises InputError for folders that hold no models and for
    names that are given twice."""
    found: dict[str, Setup] = {}
    for text in models:
        name, has_name, folder = text.partition("=")
        path = Path(folder if has_name else text)
        name = name if has_name else path.resolve().name
        if name in found:
            raise InputError(f"{text}: another set of models is called {name!r}: give NAME={text}")
        backend = resolve(loading.get("backend", "auto"))
        find(path, backend=backend)
        found[name] = Setup(str(path), name, loading, threads)
    return list(found.values())


def rules(
    host: str, allow_host: Sequence[str], cors: Sequence[str], api_key_file: Path | None, ui: bool, max_body: int
) -> Rules:
    """Who may ask for what. Raises InputError where others could reach the server without a key."""
    keys = () if api_key_file is None else read_keys(api_key_file)
    if not keys and not is_loopback(host):
        raise InputError(f"--host {host}: others could reach it: give --api-key-file FILE, with a key on each line")
    return Rules(
        hosts=(*LOCAL_NAMES, *([] if host in ("0.0.0.0", "::") else [host]), *allow_host),  # noqa: S104
        any_address=not is_loopback(host),
        origins=tuple(cors),
        keys=keys,
        challenge=FOR_BROWSERS if ui else "Bearer",
        most=max_body << 20,
    )


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one on each line. Raises InputError where there are none, or one is too short."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_KEY_BYTES).decode("utf-8")
        keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"key file {path}: cannot be read: {reason}") from error
    if not keys or min(map(len, keys)) < MIN_KEY:
        raise InputError(f"key file {path}: expected a key of at least {MIN_KEY} characters on each line")
    return keys
