"""Between the APIs and the engine: limits, deadlines, clients that go away."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from diffusion_runtime import images, noise, schedulers
from diffusion_runtime.control import ControlFile
from diffusion_runtime.errors import InputError
from diffusion_runtime.picture_size import Size
from diffusion_runtime.png_record import Settings
from diffusion_runtime.serve.engine import Engine, OnProgress, Waiting
from diffusion_runtime.serve.orders import About, Cancelled, Late, Order, Picture, Refused, Wanted


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request."""

    pictures: int = 10
    steps: int = 150
    prompt: int = 10_000
    seconds: float = 600.0


@dataclass(slots=True)
class Service:
    """``running`` are the orders of the web UI's API, for its progress and interrupt."""

    engine: Engine
    limits: Limits = field(default_factory=Limits)
    running: dict[str, Waiting] = field(default_factory=dict)

    def wanted(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
        seed: int | None = None,
        scheduler: str | None = None,
        eta: float = 0.0,
        strength: float | None = None,
        image_guidance_scale: float | None = None,
        noise_level: int | None = None,
        image: bytes | None = None,
        mask: bytes | None = None,
        mask_is_alpha: bool = False,
        controls: Sequence[tuple[ControlFile, bytes]] = (),
        size: Size | None = None,
    ) -> Wanted:
        """One picture, within the limits. Raises Refused for what is not."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt or "")):
            if len(text) > self.limits.prompt:
                raise Refused(f"{name}: {len(text)} characters: expected at most {self.limits.prompt}")
        if not 1 <= steps <= self.limits.steps:
            raise Refused(f"{steps} steps: expected 1 to {self.limits.steps}")
        if seed is not None and not 0 <= seed <= noise.MAX_SEED:
            raise Refused(f"seed {seed}: expected 0 to {noise.MAX_SEED}")
        try:
            chosen = None if scheduler is None else schedulers.canonical(scheduler)
        except InputError as error:
            raise Refused(str(error)) from None
        settings = Settings(
            prompt=prompt,
            negative_prompt=negative_prompt or None,
            seed=noise.fresh_seed() if seed is None else seed,
            scheduler=chosen,
            steps=steps,
            guidance_scale=guidance_scale,
            eta=eta,
            strength=strength if image is not None else None,
            image_guidance_scale=image_guidance_scale,
            noise_level=noise_level,
            width=None if size is None else size.width,
            height=None if size is None else size.height,
            controls=tuple(file for file, _ in controls),
        )
        return Wanted(settings, image, mask, mask_is_alpha, tuple(picture for _, picture in controls))

    def order(self, pictures: Sequence[Wanted], preview_every: int = 0) -> Order:
        if not 1 <= len(pictures) <= self.limits.pictures:
            raise Refused(f"{len(pictures)} pictures: expected 1 to {self.limits.pictures} per request")
        return Order(tuple(pictures), preview_every)

    async def about(self, model: str | None) -> About:
        return await self.engine.about(model)

    async def make(
        self,
        leaves: Callable[[], Coroutine[Any, Any, None]],
        order: Order,
        model: str | None = None,
        follow: bool = False,
        on_progress: OnProgress | None = None,
    ) -> tuple[Picture, ...]:
        """The pictures of an order; cancelled when ``leaves()``, its client, ends or the deadline passes. With
        ``follow``, it is one of those that are ``running``. Raises what `Engine.put` raises, Refused, Late, Lost
        and Cancelled."""
        waiting = self.engine.put(order, model, on_progress)
        gone = asyncio.create_task(leaves())
        if follow:
            self.running[order.id] = waiting
        try:
            async with asyncio.timeout(self.limits.seconds):
                both: tuple[asyncio.Future[Any], ...] = (waiting.answer, gone)
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if waiting.answer.done():
                return waiting.answer.result()
            raise Cancelled(())
        except TimeoutError:
            late = Late(f"not finished within {self.limits.seconds:g} s")
            self.engine.cancel(waiting, late)
            raise late from None
        finally:
            gone.cancel()
            self.running.pop(order.id, None)
            if not waiting.answer.done():
                self.engine.cancel(waiting)


async def disconnect(request: Request) -> None:
    """Wait until the client of a request, whose body has been read, goes away. Starlette's is_disconnected never
    sees it behind FastAPI's middleware."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def decoded(text: str, what: str) -> bytes:
    """The bytes of a picture that a request holds in base64, as it is or as a data URL. Raises Refused."""
    try:
        return images.from_base64(text)
    except ValueError as error:
        raise Refused(f"{what}: is not base64: {error}; a request can name no file and no URL") from None


def encoded(png: bytes) -> str:
    return base64.b64encode(png).decode()
