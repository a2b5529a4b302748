"""From noise alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion_runtime import schedulers
from diffusion_runtime.denoising import Start
from diffusion_runtime.errors import InputError
from diffusion_runtime.tasks.job import Job, Prepared, Task

if TYPE_CHECKING:
    import torch


def check(job: Job) -> None:
    """Latents that were given must fit, and be there where another model has begun."""
    check_latents(job)
    if job.request.latents is None and job.request.denoising_start is not None:
        raise InputError("denoising_start needs the latents of the model that began: give them as image or latents")
    timesteps(job)


def check_latents(job: Job) -> None:
    latents = job.request.latents
    if latents is not None and tuple(latents.shape) != job.latent_shape:
        raise InputError(f"latents have shape {tuple(latents.shape)}, expected {job.latent_shape}")


def timesteps(job: Job) -> torch.Tensor:
    """All of the scheduler's, or those that are this model's part."""
    request = job.request
    return schedulers.between(
        job.scheduler, job.scheduler.timesteps, request.denoising_start, request.denoising_end
    )


def noise_latents(job: Job) -> torch.Tensor:
    """Noise at the scheduler's first level: the caller's, else drawn."""
    latents = job.request.latents
    drawn = job.noise.normal(job.latent_shape) if latents is None else latents.float()
    return drawn * schedulers.first_level(job.scheduler)


def prepare(job: Job) -> Prepared:
    if job.request.denoising_start is not None and job.request.latents is not None:
        return Prepared(Start(job.request.latents.float(), timesteps(job)))
    return Prepared(Start(noise_latents(job), timesteps(job)))


TASK = Task(
    "text to image",
    channels=4,
    check=check,
    prepare=prepare,
    description="a prompt alone",
    takes=frozenset({"latents", "denoising_start", "denoising_end"}),
)
