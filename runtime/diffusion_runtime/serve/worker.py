"""A process that holds the models of one set and makes one order after the other.

It is sent an `Order`, and `Cancel`s at any time. It sends an `About` when the models are there, then for each order
`Progress`, `Picture`s in order, and at last a `Done`.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffusion_runtime import generation, images, schedulers
from diffusion_runtime.errors import DiffusionError, InputError
from diffusion_runtime.noise import from_seeds
from diffusion_runtime.processes import peak_memory
from diffusion_runtime.serve.orders import About, Order, Picture, Progress, Wanted

if TYPE_CHECKING:
    from diffusion_runtime.bundle.manifest import Manifest
    from diffusion_runtime.pipeline import Pipeline

MAX_PIXELS = 50_000_000
"""Of a picture in a request, which is refused by its header before it is decoded."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A set of models: its folder, the name that requests call it by, `load_pipeline`'s other arguments."""

    models: str
    name: str
    loading: Mapping[str, Any]
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    id: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an order: ``seconds`` it took; ``refused`` or ``failed`` in a line where it came to nothing."""

    seconds: float = 0.0
    refused: str | None = None
    failed: str | None = None
    cancelled: bool = False


class _Cancelled(Exception):
    pass


def work(setup: Setup, connection: Connection, alive: Callable[[], None]) -> None:
    """A worker's life. A DiffusionError is sent where the models cannot be loaded."""
    try:
        worker = _Worker(setup, connection, alive)
    except DiffusionError as error:
        connection.send(error)
        return
    connection.send(worker.about())
    while True:
        message = connection.recv()
        if isinstance(message, Order):
            connection.send(worker.make(message))


class _Worker:
    def __init__(self, setup: Setup, connection: Connection, alive: Callable[[], None]) -> None:
        import torch

        from diffusion_runtime.loading import load_pipeline

        started = time.monotonic()
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self.setup, self.connection, self.alive = setup, connection, alive
        self.pipeline: Pipeline = load_pipeline(setup.models, **setup.loading)
        self.pipeline.prewarm()
        self.seconds = time.monotonic() - started

    def about(self) -> About:
        from diffusion_runtime import t2i_adapters, tasks
        from diffusion_runtime.control import plan

        described = self.pipeline.manifest
        channels = tasks.kind(self.pipeline.channels, described.latents.channels)
        return About(
            name=self.setup.name,
            family=described.family,
            attention=described.attention,
            sizes=self.pipeline.sizes,
            needs=tasks.starts_from(channels),
            uses=tasks.uses(channels),
            can_start_from_pictures="vae_encoder" in self.pipeline.models,
            memory=peak_memory(),
            seconds=self.seconds,
            controlnets=(
                *(*plan.names(described), *t2i_adapters.names(described)),
                *(one.name for one in described.ip_adapters),
            ),
        )

    def make(self, order: Order) -> Done:
        started = time.monotonic()
        try:
            for index, wanted in enumerate(order.pictures):
                self.connection.send(self._made(order, index, wanted))
        except _Cancelled:
            return Done(cancelled=True)
        except DiffusionError as error:
            return Done(refused=" ".join(str(error).split()))
        except Exception as error:  # a bug of ours must not end the server; its traceback is what we need
            traceback.print_exc(file=sys.stderr)
            return Done(failed=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return Done(time.monotonic() - started)

    def _made(self, order: Order, index: int, wanted: Wanted) -> Picture:
        settings = wanted.settings
        name = settings.scheduler
        self.pipeline.scheduler_name = None if name is None else schedulers.canonical(name)
        request = generation.request_of(
            [settings], {**_pictures(wanted), **_steering(wanted, self.pipeline.manifest)}
        )
        run = self.pipeline.prepare(request, from_seeds([settings.seed], settings.rng))
        latents = run.start.latents
        for step in self.pipeline.denoise(run):
            latents = step.latents
            self._check(order)
            every = order.preview_every
            shown = bool(every) and step.index % every == 0 and step.index + 1 < step.total
            preview = images.png_bytes(self.pipeline.preview(step)) if shown else None
            self.connection.send(Progress(index, step.index + 1, step.total, preview))
        result = self.pipeline.finish(run, latents)
        flagged = bool(result.nsfw_content_detected and result.nsfw_content_detected[0])
        used = replace(settings, scheduler=schedulers.recorded(run.job.scheduler), **generation.filled_in(run))
        record = {**asdict(used), "task": run.task.name, **generation.record_of(self.pipeline), "flagged": flagged}
        return Picture(images.png_bytes(result.images[0], record), flagged, used, result.notes)

    def _check(self, order: Order) -> None:
        """Raise _Cancelled where somebody has cancelled the order."""
        self.alive()
        cancelled = [message for message in self._waiting() if isinstance(message, Cancel)]
        if any(message.id == order.id for message in cancelled):
            raise _Cancelled

    def _waiting(self) -> Iterator[object]:
        while self.connection.poll():
            yield self.connection.recv()


def _steering(wanted: Wanted, described: Manifest) -> dict[str, tuple[Any, ...]]:
    """The pictures that steer, by the fields of `tasks.Request`: adapters are units of the web UI's extension for
    ControlNets, too. Raises InputError for what an adapter cannot do."""
    from diffusion_runtime import picture_prompts, t2i_adapters
    from diffusion_runtime.control import Control

    after_pictures = [one.name for one in described.ip_adapters]
    found: dict[str, list[Any]] = {"controls": [], "adapters": [], "picture_prompts": []}
    for one, data in zip(wanted.settings.controls, wanted.control_pictures, strict=True):
        picture = images.decode(data, "control image", "RGB", MAX_PIXELS)
        if one.name not in (*after_pictures, *t2i_adapters.names(described)):
            control = Control(one.name, picture, one.scale, one.start, one.end, one.prepare)
            found["controls"].append(control)
        elif one.start or one.prepare or (one.name in after_pictures and one.end < 1):
            raise InputError(
                f"{one.name}: is an adapter, which counts from the first step on (IP-Adapters to the last), and "
                "its picture is not made here: leave out guidance_start, guidance_end and module"
            )
        elif one.name in after_pictures:
            found["picture_prompts"].append(picture_prompts.PicturePrompt(picture, one.name, one.scale))
        else:
            found["adapters"].append(t2i_adapters.asked(one.name, picture, one.scale, one.end))
    return {name: tuple(ones) for name, ones in found.items()}


def _pictures(wanted: Wanted) -> dict[str, Image.Image | None]:
    """By the fields of `tasks.Request`."""
    if wanted.image is None:
        return {}
    if not wanted.mask_is_alpha:
        mask = None if wanted.mask is None else images.decode(wanted.mask, "mask", "L", MAX_PIXELS)
        return {"image": images.decode(wanted.image, "image", "RGB", MAX_PIXELS), "mask": mask}
    image = images.decode(wanted.image, "image", "RGBA", MAX_PIXELS)
    marked = image if wanted.mask is None else images.decode(wanted.mask, "mask", "RGBA", MAX_PIXELS)
    painted = marked.getchannel("A").point(lambda alpha: 255 - alpha)
    mask = painted if painted.getbbox() or wanted.mask is not None else None
    return {"image": image.convert("RGB"), "mask": mask}
