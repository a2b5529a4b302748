"""Changing a picture as a prompt says: the UNet sees the whole of it, as latents beside those that it denoises
(Brooks et al., InstructPix2Pix, 2023)."""

from __future__ import annotations

import torch

from diffusion_runtime import images
from diffusion_runtime.bundle.manifest import OwnLatents
from diffusion_runtime.denoising import Start
from diffusion_runtime.tasks import text_to_image
from diffusion_runtime.tasks.image_to_image import moments
from diffusion_runtime.tasks.job import Job, Prepared, Task


def check(job: Job) -> None:
    """The picture must be there, and latents fit."""
    text_to_image.check(job)
    job.image()


def prepare(job: Job) -> Prepared:
    mean, _ = moments(job, images.to_tensor(job.image(), *job.size))
    job.models.release("vae_encoder")
    return Prepared(
        Start(text_to_image.noise_latents(job), text_to_image.timesteps(job)), channels=_seen(job, mean)
    )


def _seen(job: Job, mean: torch.Tensor) -> torch.Tensor:
    """The likeliest latents of the picture as the UNet was trained to see them: not scaled, as the checkpoint's own
    VAE gives them, whatever was folded into the encoder; CosXL's alone are scaled."""
    own = job.manifest.folded.latents or OwnLatents(scale=job.manifest.latents.scale)
    std, centre = (
        torch.tensor(values or (default,)).reshape(1, -1, 1, 1)
        for values, default in ((own.std, 1.0), (own.mean, own.shift))
    )
    latents = mean
    if job.manifest.folded.latents is not None:
        latents = mean * (job.manifest.latents.scale / own.scale) * std + centre
    return latents * own.scale if job.manifest.scales_image_latents else latents


TASK = Task(
    "editing",
    channels=8,
    check=check,
    prepare=prepare,
    description="--image, models of an InstructPix2Pix checkpoint; --image-guidance-scale",
    needs=frozenset({"image"}),
    takes=frozenset({"image_guidance_scale", "latents", "denoising_end"}),
)
