"""Four times larger: the UNet sees the small picture, slightly noised, beside the latents."""

from __future__ import annotations

import torch

from diffusion_runtime import images, schedulers
from diffusion_runtime.denoising import Start
from diffusion_runtime.errors import InputError
from diffusion_runtime.tasks.job import Job, Prepared, Task
from diffusion_runtime.tasks.text_to_image import noise_latents

MAX_NOISE_LEVEL = 350  # what stabilityai/stable-diffusion-x4-upscaler was trained with


def prepare(job: Job) -> Prepared:
    level = job.request.noise_level
    if not 0 <= level <= MAX_NOISE_LEVEL:
        raise InputError(f"noise level {level}: expected 0 to {MAX_NOISE_LEVEL}")
    config = job.manifest.noise_scheduler
    if config is None:
        raise InputError("the manifest of these models has no noise_scheduler (the checkpoint's low_res_scheduler)")
    height, width = job.latent_size
    image = job.image(size=(height, width))
    small = images.to_tensor(image, height, width)
    count = job.request.pictures if job.noise.per_picture else 1
    noise = job.noise.normal((count, *small.shape[1:]))
    noised = schedulers.build(config).add_noise(small, noise, torch.tensor([level]))
    start = Start(noise_latents(job), job.scheduler.timesteps)
    return Prepared(start, channels=noised, labels={"class_labels": float(level)})


TASK = Task(
    "upscaling",
    channels=7,
    prepare=prepare,
    description="--image (a quarter of the result's size), models of the x4 upscaler; --noise-level",
    needs=frozenset({"image"}),
)
