"""What stands behind the page of `serve --ui`, without Gradio and without a browser."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from diffusion_runtime import images
from diffusion_runtime.picture_size import Size
from diffusion_runtime.png_record import Settings
from diffusion_runtime.serve.engine import Engine
from diffusion_runtime.serve.guard import Message, Receive, Scope, Send
from diffusion_runtime.serve.orders import About, Busy, Order, Picture, Progress, Refused, Wanted
from diffusion_runtime.serve.page import layout
from diffusion_runtime.serve.page.drawing import Drawings
from diffusion_runtime.serve.page.gate import Gate
from diffusion_runtime.serve.service import Service
from diffusion_runtime.serve.worker import Setup
from diffusion_runtime.tasks import uses
from serving import COMMAND

PNG = base64.b64encode(images.png_bytes(Image.new("RGB", (8, 8), "red"))).decode()
ORDER = Order((Wanted(Settings("a cat", seed=2**64 - 1)),))
PICTURE = Picture(
    images.png_bytes(Image.new("RGB", (8, 8)), {"prompt": "a cat", "seed": 2**64 - 1, "guidance_scale": 3.5}),
    False,
    ORDER.pictures[0].settings,
    ("the image was resized",),
)


def page(channels: int = 4) -> Any:
    """The page of one set of models with a UNet of so many input channels."""
    service = Service(Engine([Setup("nowhere", "models", {})]))
    known = About("models", "sd1", "original", (Size(64, 64),), (), uses(channels), True, 0, 0.0)
    service.engine.default.about = known
    return layout._Page(service, Drawings(service), cast("Any", None))


def ordered(channels: int = 4, **changed: Any) -> Wanted:
    values: dict[str, Any] = {
        "prompt": "a cat", "negative": "", "start": "", "strength": 0.6, "noise_level": 30, "steps": 25,
        "guidance": "", "scheduler": layout.OWN_SCHEDULER, "seed": "", "size": "64x64",
    }  # fmt: skip
    order: Order = asyncio.run(page(channels).order("models", *{**values, **changed}.values()))
    return order.pictures[0]


def test_the_task_is_told_by_what_is_given() -> None:
    picture, both = ({"image": f"data:image/png;base64,{PNG}", "mask": mask} for mask in (None, PNG))
    assert (ordered().image, ordered().settings.strength, ordered().settings.noise_level) == (None, None, None)
    started = ordered(start=json.dumps(picture))
    assert started.image == base64.b64decode(PNG) and started.mask is None
    assert started.settings.strength == 0.6
    assert ordered(start=json.dumps(both)).mask == base64.b64decode(PNG)
    upscaled = ordered(7, start=json.dumps(picture)).settings
    assert (upscaled.strength, upscaled.noise_level) == (None, 30)


def test_what_is_left_empty_is_the_models_own() -> None:
    left, chosen = ordered().settings, ordered(guidance=" 3.5", seed=f" {2**64 - 1} ", scheduler="euler").settings
    assert (left.guidance_scale, left.scheduler, left.negative_prompt) == (None, None, None)
    assert ordered().settings.seed != left.seed
    assert (chosen.guidance_scale, chosen.scheduler, chosen.seed) == (3.5, "euler", 2**64 - 1)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": "-1"}, "seed '-1': expected a whole number"),
        ({"seed": str(2**64)}, "expected 0 to"),
        ({"guidance": "much"}, "guidance 'much': expected a number"),
        ({"steps": 151}, "expected 1 to 150"),
        ({"start": '{"image": "/etc/hosts"}'}, "a request can name no file and no URL"),
        ({"start": '{"image": "http://127.0.0.1/a.png"}'}, "a request can name no file and no URL"),
        ({"start": "[]"}, "is not what the page sends"),
        ({"start": "{"}, "is not what the page sends"),
        ({"prompt": "x" * 10_001}, "expected at most 10000"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(Refused, match=re.escape(expected)):
        ordered(**changed)


class Slow:
    """A service that tells of two steps and then waits, until it may end."""

    def __init__(self, end: Exception | None = None) -> None:
        self.may_end, self.end, self.was_cancelled = asyncio.Event(), end, False
        self.engine = Engine([Setup("nowhere", "models", {})])

    async def make(
        self, _: object, order: Order, model: str, on_progress: Callable[[Progress], None]
    ) -> tuple[Picture, ...]:
        assert (order, model) == (ORDER, "models")
        on_progress(Progress(0, 1, 4, b"seen"))
        on_progress(Progress(0, 2, 4))
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.end is not None:
            raise self.end
        return (PICTURE,)


async def followed(slow: Slow, act: Callable[[Drawings], None]) -> list[dict[str, Any]]:
    """What is told, of which something is done at the first step."""
    drawings, told = Drawings(cast("Service", slow)), []
    async for news in drawings.follow("tab", ORDER, "models"):
        told.append(news)
        if news["text"].startswith("Step"):
            act(drawings)
    assert drawings.running == {}
    return told


def test_steps_and_previews_are_told_and_then_the_picture() -> None:
    slow = Slow()
    told = asyncio.run(followed(slow, lambda _: slow.may_end.set()))
    step, last = told[-2:]
    assert step == {"state": "working", "text": "Step 2 of 4", "done": 0.5, "preview": "c2Vlbg=="}
    assert (last["state"], last["text"], last["seed"]) == ("made", "Done; the image was resized", str(2**64 - 1))
    assert base64.b64decode(last["png"]) == PICTURE.png
    assert last["record"] == {"prompt": "a cat", "seed": str(2**64 - 1), "guidance scale": "3.5"}


def test_a_preview_is_sent_once() -> None:
    slow, seen = Slow(), list[int]()

    def act(_: Drawings) -> None:
        seen.append(1)
        if len(seen) == 3:
            slow.may_end.set()

    told = asyncio.run(followed(slow, act))
    assert sum("preview" in news for news in told) == 1


def test_cancel_is_for_its_own_tab_alone() -> None:
    slow = Slow()

    def act(drawings: Drawings) -> None:
        drawings.cancel("another tab")
        assert not drawings.running["tab"].cancelling()
        drawings.cancel("tab")

    told = asyncio.run(followed(slow, act))
    assert told[-1] == {"state": "failed", "text": "Cancelled"}
    assert slow.was_cancelled


def test_a_listener_that_goes_away_cancels() -> None:
    async def leave() -> bool:
        slow = Slow()
        telling = Drawings(cast("Service", slow)).follow("tab", ORDER, "models")
        async for news in telling:
            if news["text"].startswith("Step"):
                break
        await telling.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        return slow.was_cancelled

    assert asyncio.run(leave())


def test_a_full_queue_is_told() -> None:
    slow = Slow(Busy(7))
    told = asyncio.run(followed(slow, lambda _: slow.may_end.set()))
    assert told[-1] == {"state": "failed", "text": "The queue is full; try again in about 7 s"}


def test_how_many_come_before_is_told() -> None:
    async def ahead() -> tuple[int | None, ...]:
        engine = Engine([Setup("nowhere", "models", {})])
        orders = [Order((Wanted(Settings(str(number))),)) for number in range(3)]
        for order in orders[:2]:
            engine.put(order)
        return tuple(map(engine.ahead, orders))

    assert asyncio.run(ahead()) == (0, 1, None)


def through_the_gate(
    method: str, path: str, body: bytes = b"", page: bytes = b""
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body; behind the gate is an application that answers ``page``, or what it was sent."""

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        told = page or (await receive())["body"]
        headers = [(b"content-length", str(len(told)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": told})

    answers: list[Message] = []
    sent = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(sent)

    async def send(message: Message) -> None:
        answers.append(message)

    scope: Scope = {"type": "http", "method": method, "path": path, "headers": []}
    run: Awaitable[None] = Gate(app)(scope, receive, send)
    asyncio.run(cast("Any", run))
    return answers[0]["status"], dict(answers[0]["headers"]), answers[1]["body"]


def test_the_gate_lets_through_what_the_page_needs() -> None:
    plain = json.dumps({"data": ["a", 1, 0.5, None, True], "event_data": {"kind": "mask"}}).encode()
    assert through_the_gate("POST", "/gradio_api/queue/join", plain)[::2] == (200, plain)
    assert through_the_gate("GET", "/assets/a.js")[0] == 200
    for method, path in (("GET", "/gradio_api/file=/etc/hosts"), ("POST", "/gradio_api/upload"), ("PUT", "/")):
        assert through_the_gate(method, path)[0] == 404


@pytest.mark.parametrize(
    "sent", [{"data": [{"path": "/etc/hosts"}]}, {"data": [["x"]]}, {"event_data": {"kind": {"url": "x"}}}, [], 1]
)
def test_the_gate_refuses_what_no_control_has(sent: Any) -> None:
    assert through_the_gate("POST", "/gradio_api/queue/join", json.dumps(sent).encode())[0] == 400
    assert through_the_gate("POST", "/gradio_api/queue/join", b"{" + json.dumps(sent).encode())[0] == 400


def test_the_page_is_sent_without_what_browsers_would_ask_for() -> None:
    told = b'<html><head><link rel="manifest" href="/manifest.json" /></head>'
    _, headers, body = through_the_gate("GET", "/", page=told)
    assert b"manifest" not in body and body.startswith(b'<html><head><link rel="icon" href="data:')
    assert headers[b"content-length"] == str(len(body)).encode()
    assert b"connect-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is here")
def test_without_gradio_the_extra_is_named(tmp_path: Path) -> None:
    ended = subprocess.run([*COMMAND, str(tmp_path), "--ui"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "pip install 'coreml-sd[ui]'" in ended.stderr and "Traceback" not in ended.stderr
