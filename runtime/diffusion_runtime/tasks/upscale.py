"""Four times larger: the UNet sees the small picture, slightly noised, in addition to the latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusion_runtime import images, schedulers
from diffusion_runtime.denoising import Start
from diffusion_runtime.errors import InputError
from diffusion_runtime.tasks import text_to_image
from diffusion_runtime.tasks.job import Job, Prepared, Task

MAX_NOISE_LEVEL = 350  # what stabilityai/stable-diffusion-x4-upscaler was trained with


def check(job: Job) -> None:
    """The picture must be there, the noise level one that the model was trained with, and latents fit."""
    text_to_image.check(job)
    job.image(size=job.latent_size)
    level = job.request.noise
    if not 0 <= level <= MAX_NOISE_LEVEL:
        raise InputError(f"noise level {level}: expected 0 to {MAX_NOISE_LEVEL}")
    _noise_config(job)


def prepare(job: Job) -> Prepared:
    level = job.request.noise
    height, width = job.latent_size
    image = job.image(size=(height, width))
    small = images.to_tensor(image, height, width)
    # diffusers noises the small picture once for all prompts; with a generator each, each draws its own.
    count = job.request.pictures if job.noise.per_picture else 1
    noise = job.noise.normal((count, *small.shape[1:]))
    noised = schedulers.build(_noise_config(job)).add_noise(small, noise, torch.tensor([level]))
    start = Start(text_to_image.noise_latents(job), job.scheduler.timesteps)
    return Prepared(start, channels=noised, labels={"class_labels": float(level)})


def _noise_config(job: Job) -> Mapping[str, Any]:
    if job.manifest.noise_scheduler is None:
        raise InputError("the manifest of these models has no noise_scheduler (the checkpoint's low_res_scheduler)")
    return job.manifest.noise_scheduler


TASK = Task(
    "upscaling",
    channels=7,
    check=check,
    prepare=prepare,
    description="--image (a quarter of the result's size), models of the x4 upscaler; --noise-level",
    needs=frozenset({"image"}),
    takes=frozenset({"noise_level", "latents"}),
)
