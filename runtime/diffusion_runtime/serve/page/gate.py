"""Stands before Gradio: of its many routes only those that the page needs, and nothing in them that names a file or
an address; what the browser may load is told to it, too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from diffusion_runtime.serve.guard import App, Message, Receive, Scope, Send, answer, replay

PAGES = ("", "/", "/theme.css")
FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
READ = ("/config", "/gradio_api/queue/data", "/gradio_api/startup-events")
SENT = ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel")
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; worker-src 'self' blob:; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Gradio's templates are evaluated; everything else comes from here."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
MANIFEST = b'<link rel="manifest" href="/manifest.json" />'
ICON = (
    b"<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    b"%3Crect width='16' height='16' rx='3' fill='%231d4ed8'/%3E"
    b"%3Ccircle cx='8' cy='8' r='4.5' fill='%23f97316'/%3E"
    b'%3C/svg%3E"><meta name="color-scheme" content="light dark">'
)
"""Browsers ask for a manifest without the key, and for an icon where they are told of none."""


@dataclass(frozen=True, slots=True)
class Gate:
    app: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if not _is_open(scope):
            await answer(scope, send, 404, "Not Found")
            return
        if scope["method"] == "POST":
            body = await _read(receive)
            if not _is_plain(body):
                await answer(scope, send, 400, "expected plain values, no files and no addresses")
                return
            receive = replay(body, receive)
        await self.app(scope, receive, _Page(send) if _path(scope) in ("", "/") else _with_headers(send))


def _path(scope: Scope) -> str:
    path = str(scope["path"])
    return path.removeprefix(scope.get("root_path", ""))


def _is_open(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    path = _path(scope)
    if scope["method"] == "POST":
        return path in SENT
    return scope["method"] in ("GET", "HEAD") and (path in PAGES + READ or path.startswith(FOLDERS))


def _is_plain(body: bytes) -> bool:
    """Whether the values of the page's controls are what its controls have: no list, and nothing that Gradio would
    take for a file or an address."""
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(sent, dict):
        return False
    event = sent.get("event_data") or {}
    values = sent.get("data") or []
    return (
        isinstance(values, list)
        and isinstance(event, dict)
        and all(isinstance(value, str | int | float | None) for value in (*values, *event.values()))
    )


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *HEADERS]
        await send(message)

    return sent


@dataclass(slots=True)
class _Page:
    """The page itself, without what browsers would ask for on their own."""

    send: Send
    start: Message = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        self.parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(self.parts).replace(MANIFEST, b"").replace(b"<head>", b"<head>" + ICON, 1)
        kept = [(name, value) for name, value in self.start["headers"] if name.lower() != b"content-length"]
        self.start["headers"] = [*kept, (b"content-length", str(len(body)).encode()), *HEADERS]
        await self.send(self.start)
        await self.send({"type": "http.response.body", "body": body})
