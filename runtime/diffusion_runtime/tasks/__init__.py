"""The kinds of generation. To add one: a file with a Task, and a line here."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from diffusion_runtime.errors import InputError
from diffusion_runtime.tasks import depth_to_image, edit, image_to_image, inpaint, text_to_image, upscale
from diffusion_runtime.tasks.job import GIVEN, Job, Prepared, Request, Task

TASKS: tuple[Task, ...] = (
    text_to_image.TASK,
    image_to_image.TASK,
    inpaint.BLENDING,
    inpaint.SEEING,
    depth_to_image.TASK,
    upscale.TASK,
    edit.TASK,
)

__all__ = ["TASKS", "Job", "Prepared", "Request", "Task", "choose", "kind", "starts_from", "uses"]


def kind(channels: int, latent_channels: int) -> int:
    """By what number of channels tasks are told apart for a network that takes ``channels``, of which the latents
    are ``latent_channels``: that of a UNet whose latents are Stable Diffusion 1's."""
    return channels - latent_channels + text_to_image.TASK.channels


def starts_from(channels: int) -> tuple[str, ...]:
    """What a UNet with so many input channels has to be given in addition to a prompt (keys of `GIVEN`); nothing
    where no task is known for it."""
    needs = [task.needs for task in TASKS if task.channels == channels]
    return tuple(name for name in GIVEN if needs and all(name in needed for needed in needs))


def uses(channels: int) -> tuple[str, ...]:
    """What a UNet with so many input channels can be given in addition to a prompt (keys of `GIVEN`)."""
    able = [task for task in TASKS if task.channels == channels]
    return tuple(name for name in GIVEN if any(name in task.needs | task.takes for task in able))


def choose(channels: int, given: AbstractSet[str]) -> Task:
    """The task that a UNet with so many input channels does with what is given (`Request.given`).

    Raises InputError that names what is missing or cannot be used."""
    able = [task for task in TASKS if task.channels == channels]
    if not able:
        known = ", ".join(str(task.channels) for task in TASKS)
        raise InputError(f"the UNet takes {channels} channels, and no task is known for that (known: {known})")
    fitting = [task for task in able if task.needs <= given <= task.needs | task.takes]
    if fitting:
        return fitting[0]
    ways = "; or ".join(f"{task.name}: {task.description}" for task in able)
    raise InputError(f"given {_listed(given)}, but these models do {ways}")


def _listed(given: AbstractSet[str]) -> str:
    return " and ".join(GIVEN[name] for name in GIVEN if name in given) or "a prompt alone"
