"""What is checked of every request before anything reads it: Host, Origin, key, size and pace of the body."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health/live", "/health/ready")
"""For those who watch over the server, and tell nothing."""


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


@dataclass(frozen=True, slots=True)
class Rules:
    """``hosts`` that requests may name (others' pages may have names that lead here) and, where other machines may
    come, any IP address; ``origins`` of web pages that may send them, beside the server's own; ``keys``, one of
    which is needed where there are any, and the ``challenge`` that asks for it; ``most`` bytes of a body, which
    comes within ``seconds``."""

    hosts: Sequence[str] = LOCAL_NAMES
    any_address: bool = False
    origins: Sequence[str] = ()
    keys: Sequence[str] = ()
    challenge: str = "Bearer"
    most: int = 32 << 20
    seconds: float = 30.0

    def knows(self, name: str) -> bool:
        return name in self.hosts or (self.any_address and _address(name) is not None)


@dataclass(frozen=True, slots=True)
class Guard:
    """Stands before an application."""

    app: App
    rules: Rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await answer(scope, send, *refusal, self.rules.challenge)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        body = await self._body(headers, receive)
        if isinstance(body, tuple):
            await answer(scope, send, *body)
            return
        await self.app(scope, replay(body, receive), send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self.rules.knows(_name(host)):
            return 421, f"this server is not {host[:200]!r}: it answers to {', '.join(self.rules.hosts)}"
        origin = headers.get("origin")
        own = (f"http://{host}", f"https://{host}")  # a proxy before it may speak TLS
        if origin is not None and origin not in own and origin not in self.rules.origins:
            return 403, "requests from web pages of other servers are refused (--cors ORIGIN allows one)"
        if self.rules.keys and scope["path"] not in OPEN_PATHS and not self._is_known(_key(headers)):
            return 401, "a key is needed: Authorization: Bearer KEY"
        return None

    def _is_known(self, key: str) -> bool:
        # Every key is compared, in constant time: how long it takes tells nothing of them.
        known = [hmac.compare_digest(key.encode(), one.encode()) for one in self.rules.keys]
        return any(known)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | tuple[int, str]:
        """The whole body, or the status and the reason why it is refused."""
        told = headers.get("content-length", "0")
        is_too_large = not told.isdecimal() or int(told) > self.rules.most
        too_large = 413, f"the body is larger than {self.rules.most >> 20} MiB"
        if is_too_large and "expect" in headers:  # the client asks before it sends
            return too_large
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.rules.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 400, "the body was not sent whole"
                    parts.append(message.get("body", b""))
                    if is_too_large or sum(map(len, parts)) > self.rules.most:
                        is_too_large = True
                        parts.clear()  # read on all the same: most clients read no answer before they have sent all
                    if not message.get("more_body", False):
                        return too_large if is_too_large else b"".join(parts)
        except TimeoutError:
            return too_large if is_too_large else (408, f"the body did not arrive within {self.rules.seconds:g} s")


def replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once, and then what really comes: the client going away."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _name(host: str) -> str:
    """A Host header without its port; empty where it is none."""
    if not host.isascii() or "@" in host:
        return ""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _key(headers: dict[str, str]) -> str:
    """The key of a request, however clients send it: OpenAI's as Bearer, Azure's as api-key, the web UI's as the
    password of Basic."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return headers.get("api-key", headers.get("x-api-key", ""))


async def answer(scope: Scope, send: Send, status: int, reason: str, challenge: str = "Bearer") -> None:
    """Refuse a request with ``reason``, in the shape that OpenAI's and FastAPI's clients read."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason[:100]})
        return
    body = json.dumps({"error": {"message": reason, "type": "invalid_request_error"}, "detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", challenge.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
