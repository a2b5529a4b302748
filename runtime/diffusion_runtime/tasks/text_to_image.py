"""From noise alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion_runtime.denoising import Start
from diffusion_runtime.errors import InputError
from diffusion_runtime.tasks.job import Job, Prepared, Task

if TYPE_CHECKING:
    import torch


def check(job: Job) -> None:
    """Latents that were given must fit."""
    latents = job.request.latents
    if latents is not None and tuple(latents.shape) != job.latent_shape:
        raise InputError(f"latents have shape {tuple(latents.shape)}, expected {job.latent_shape}")


def noise_latents(job: Job) -> torch.Tensor:
    """Noise at the scheduler's first level: the caller's, else drawn."""
    latents = job.request.latents
    drawn = job.noise.normal(job.latent_shape) if latents is None else latents.float()
    return drawn * float(job.scheduler.init_noise_sigma)


def prepare(job: Job) -> Prepared:
    return Prepared(Start(noise_latents(job), job.scheduler.timesteps))


TASK = Task(
    "text to image",
    channels=4,
    check=check,
    prepare=prepare,
    description="a prompt alone",
    takes=frozenset({"latents"}),
)
