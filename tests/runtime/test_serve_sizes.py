"""Models of several sizes behind each API of `serve`: requests choose one, and hear which there are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import httpx2 as httpx
import pytest
from PIL import Image

from diffusion_runtime import images
from diffusion_runtime.picture_size import Size
from diffusion_runtime.serve import app, guard
from diffusion_runtime.serve.engine import Engine
from diffusion_runtime.serve.orders import About, Order, Picture, Refused
from diffusion_runtime.serve.page import layout
from diffusion_runtime.serve.page.drawing import Drawings
from diffusion_runtime.serve.service import Service
from diffusion_runtime.serve.worker import Setup
from serving import score

SIZES = (Size(64, 64), Size(96, 64), Size(64, 128))


class Recorded(Service):
    """A service whose models draw nothing: it keeps what they are asked for."""

    def __init__(self, sizes: tuple[Size, ...]) -> None:
        super().__init__(Engine([Setup("nowhere", "models", {})]))
        self.engine.default.about = About("models", "sd1", "original", sizes, (), ("image",), True, 0, 0.0)
        self.asked: list[tuple[int | None, int | None]] = []

    async def make(self, leaves: Any, order: Order, *_: Any, **__: Any) -> tuple[Picture, ...]:  # noqa: ARG002
        self.asked += [(one.settings.width, one.settings.height) for one in order.pictures]
        png = images.png_bytes(Image.new("RGB", (8, 8)))
        return tuple(Picture(png, False, one.settings) for one in order.pictures)


def answer(service: Service, path: str, body: dict[str, Any]) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=cast("Any", app.build(service, guard.Rules())))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, json=body)

    return asyncio.run(ask())


SCORE = score(["prompt"], "a cat", width=96, height=64)
PAGE = ("models", "a cat", "", "", 0.6, 30, 25, "", layout.OWN_SCHEDULER, "5")


def by_page(service: Service, size: str) -> None:
    page = layout._Page(service, Drawings(service), cast("Any", None))
    order = asyncio.run(page.order(*PAGE, size))
    asyncio.run(service.make(None, order))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ask", "asked"),
    [
        (lambda one: answer(one, "/v1/images/generations", {"prompt": "a", "size": "96x64"}), (96, 64)),
        (lambda one: answer(one, "/v1/images/generations", {"prompt": "a", "size": "auto"}), (None, None)),
        (lambda one: answer(one, "/sdapi/v1/txt2img", {"prompt": "a", "width": 64, "height": 128}), (64, 128)),
        (lambda one: answer(one, "/sdapi/v1/txt2img", {"prompt": "a", "width": 96}), (96, 64)),
        (lambda one: answer(one, "/score", SCORE), (96, 64)),
        (lambda one: answer(one, "/score", score(["prompt"], "a")), (None, None)),
        (lambda one: by_page(one, "64x128"), (64, 128)),
    ],
)
def test_each_api_draws_the_size_that_is_asked_for(
    ask: Callable[[Service], httpx.Response | None], asked: tuple[int | None, int | None]
) -> None:
    service = Recorded(SIZES)
    found = ask(service)
    assert found is None or found.status_code == 200, found.text
    assert service.asked == [asked]


def test_an_answer_tells_the_size() -> None:
    service = Recorded(SIZES)
    assert answer(service, "/v1/images/generations", {"prompt": "a", "size": "96x64"}).json()["size"] == "96x64"
    told = answer(service, "/sdapi/v1/txt2img", {"prompt": "a", "width": 64, "height": 128}).json()
    info = json.loads(told["info"])
    assert (
        (told["parameters"]["width"], told["parameters"]["height"]) == (info["width"], info["height"]) == (64, 128)
    )
    assert "Size: 64x128" in info["infotexts"][0] and info["notes"] == []


def test_other_sizes_are_refused_with_those_that_there_are() -> None:
    """The web UI's clients send a size in any case: they get the first one, and a note."""
    service, said = Recorded(SIZES), "64x64, 96x64 and 64x128"
    for path, body in (
        ("/v1/images/generations", {"prompt": "a", "size": "512x512"}),
        ("/v1/images/generations", {"prompt": "a", "size": "large"}),
        ("/score", score(["prompt"], "a cat", width=512)),
    ):
        refused = answer(service, path, body)
        assert refused.status_code == 400 and said in refused.json()["detail"]
    told = answer(service, "/sdapi/v1/txt2img", {"prompt": "a", "width": 512, "height": 512}).json()
    assert json.loads(told["info"])["notes"] == [f"the models make {said}"]
    assert service.asked == [(None, None)]
    for size, why in (("96x96", said), ("…", "expected WIDTHxHEIGHT")):
        with pytest.raises(Refused, match=why):
            by_page(service, size)
    with pytest.raises(Refused, match="make 64x64 alone"):
        Recorded(SIZES[:1]).engine.default.about.size(96, 64)  # type: ignore[union-attr]
