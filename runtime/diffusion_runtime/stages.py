"""A prepared run of a pipeline, and that of the refiner which goes on where it ends."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from diffusion_runtime import denoising, guidance, schedulers, tasks
from diffusion_runtime.bundle import views
from diffusion_runtime.denoising import Step
from diffusion_runtime.errors import InputError
from diffusion_runtime.models import Models
from diffusion_runtime.picture_size import listed

if TYPE_CHECKING:
    from diffusion_runtime.bundle.manifest import Manifest
    from diffusion_runtime.picture_size import Size
    from diffusion_runtime.tasks import Request


@dataclass(frozen=True, slots=True)
class Run:
    """A prepared run: everything up to the first step. It holds no model."""

    job: tasks.Job
    task: tasks.Task
    start: denoising.Start
    conditions: guidance.Conditions
    refiner: Run | None = None

    @property
    def total(self) -> int:
        """How many steps `Pipeline.denoise` will yield."""
        return len(self.timesteps)

    @property
    def timesteps(self) -> torch.Tensor:
        """Of all steps, those of a refiner after the others."""
        own = self.start.timesteps
        return own if self.refiner is None else torch.cat([own, self.refiner.timesteps.to(own)])

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.job.notes)


def of_size(made: Manifest, models: Models, asked: Size) -> tuple[Manifest, Models]:
    """What describes and what makes pictures of another size than the first. Raises InputError, with the sizes that
    there are, for one that cannot be made."""
    if asked not in made.sizes:
        raise InputError(
            f"{asked} pixels: these models make {listed(made.sizes)} (width x height); convert again "
            f"with --size {asked} to add that size"
        )
    return views.of_size(made, asked), models.of_size(str(asked))


def scheduler(
    made: Manifest, name: str | None, chosen: Any, is_set: bool, request: Request, task: tasks.Task
) -> Any:
    """That of one run. ``chosen``: the pipeline's, ``name``: what it was asked for by; ``is_set``: by its user. On
    schedulers diffusers' pipelines with ControlNets and T2I-Adapters impose nothing."""
    if not (request.controls or request.adapters):
        return schedulers.own(chosen, task.scheduler_settings)
    if made.steered_scheduler is not None and not is_set:
        chosen = schedulers.build({**made.steered_scheduler, "prediction_type": made.prediction_type}, name)
    return schedulers.own(chosen, {})


def apart(request: Request) -> tuple[Request, Request | None]:
    """What the base is asked for, and the refiner where ``refiner_start`` is given. Raises InputError where the
    request ends early anyway."""
    if request.refiner_start is None:
        return request, None
    if request.denoising_end is not None:
        raise InputError("refiner_start and denoising_end are both given: give one")
    base = replace(request, denoising_end=request.refiner_start, refiner_start=None)
    refined = replace(request, image=None, mask=None, strength=None, latents=None, refiner_start=None)
    refined = replace(refined, controls=(), guess_mode=False, adapters=(), picture_prompts=())
    return base, replace(refined, denoising_start=request.refiner_start)


def renumbered(
    steps: Generator[Step, torch.Tensor | None, None], latents: torch.Tensor, first: int, total: int
) -> Generator[Step, torch.Tensor | None, torch.Tensor]:
    """One stage of several: its steps counted on from ``first`` of ``total``. Returns the latents after the last
    one; ``latents`` where there was none."""
    changed = None
    try:
        while True:
            step = steps.send(changed)
            changed = yield replace(step, index=first + step.index, total=total)
            latents = step.latents if changed is None else changed
    except StopIteration:
        return latents
    finally:
        steps.close()
