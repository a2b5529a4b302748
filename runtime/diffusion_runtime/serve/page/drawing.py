"""An order as the page follows it: its place in the queue, its steps and previews, and at last the pictures."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diffusion_runtime import images
from diffusion_runtime.serve.orders import Busy, Cancelled, Closing, Late, Lost, Order, Picture, Progress, Refused
from diffusion_runtime.serve.service import Service, encoded

PREVIEWS = 8
"""Of a picture, at most: each is a call of the decoder."""
SECONDS_BETWEEN_TELLINGS = 0.2
ENDS = (Refused, Busy, Closing, Late, Lost)


@dataclass(slots=True)
class Drawings:
    """What is being drawn, by the tab that asked for it."""

    service: Service
    running: dict[str, asyncio.Task[tuple[Picture, ...]]] = field(default_factory=dict)

    async def follow(self, tab: str, order: Order, model: str) -> AsyncIterator[dict[str, Any]]:
        """What to show of an order, until it is there or has failed. Whoever stops listening cancels it."""
        heard: list[Progress] = []
        making = asyncio.create_task(self.service.make(_never, order, model, on_progress=heard.append))
        self.running[tab] = making
        try:
            while not making.done():
                yield self._now(order, heard)
                await asyncio.wait({making}, timeout=SECONDS_BETWEEN_TELLINGS)
            yield _end(making)
        finally:
            making.cancel()
            if self.running.get(tab) is making:
                del self.running[tab]

    def cancel(self, tab: str) -> None:
        if tab in self.running:
            self.running[tab].cancel()

    def _now(self, order: Order, heard: list[Progress]) -> dict[str, Any]:
        if not heard:
            ahead = self.service.engine.ahead(order)
            text = f"Waiting: {ahead} before this one" if ahead else "Starting"
            return {"state": "working", "text": text, "done": 0}
        last = heard[-1]
        previews = [told.preview for told in heard if told.preview is not None]
        heard[:] = [last]
        told: dict[str, Any] = {
            "state": "working",
            "text": f"Step {last.step} of {last.total}",
            "done": last.step / last.total,
        }
        return {**told, "preview": encoded(previews[-1])} if previews else told


def every(steps: int) -> int:
    """After how many steps a preview is made."""
    return max(2, -(-steps // PREVIEWS))


def failed(reason: object) -> dict[str, Any]:
    return {"state": "failed", "text": f"{str(reason)[:1].upper()}{str(reason)[1:]}"}


def _end(making: asyncio.Task[tuple[Picture, ...]]) -> dict[str, Any]:
    try:
        picture = making.result()[0]
    except (asyncio.CancelledError, Cancelled):
        return failed("cancelled")
    except ENDS as error:
        return failed(error)
    notes = ("the safety checker has blackened it", *picture.notes) if picture.flagged else picture.notes
    return {
        "state": "made",
        "text": "; ".join(("Done", *notes)),
        "png": encoded(picture.png),
        "prompt": picture.settings.prompt,
        "seed": str(picture.settings.seed),  # as a number, JavaScript would round it
        "record": _record(picture.png),
    }


def _record(png: bytes) -> dict[str, str]:
    """How a picture was made, as it says itself, in words."""
    with Image.open(io.BytesIO(png)) as image:
        found: Mapping[str, Any] = json.loads(image.info[images.METADATA_KEY])
    told = {name: value for name, value in found.items() if value not in (None, "", False)}
    return {name.replace("_", " "): _in_words(value) for name, value in told.items()}


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return "yes" if value is True else str(value)


async def _never() -> None:
    await asyncio.Event().wait()  # Gradio ends the listening where the tab is closed
