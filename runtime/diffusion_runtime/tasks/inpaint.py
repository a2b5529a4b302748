"""Painting anew where the mask is white: with a UNet that sees mask and surroundings, or by blending latents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import interpolate

from diffusion_runtime import images
from diffusion_runtime.denoising import AfterStep, Start
from diffusion_runtime.errors import InputError
from diffusion_runtime.schedulers import first_level, last_part, noised
from diffusion_runtime.tasks import text_to_image
from diffusion_runtime.tasks.image_to_image import encode
from diffusion_runtime.tasks.job import Job, Prepared, Task


def check(job: Job) -> None:
    """Picture and mask must be there, the mask show what to paint, the strength leave a step, and latents fit."""
    text_to_image.check_latents(job)
    _image_and_mask(job)
    last_part(job.scheduler, job.request.step_count, job.request.change)


def prepare_seeing(job: Job) -> Prepared:
    """For a UNet with 9 channels: latents, mask, latents of the picture with the masked part grey."""
    image, mask = _image_and_mask(job)
    timesteps = last_part(job.scheduler, job.request.step_count, job.request.change)
    clean = None if _from_noise(job) else encode(job, image)
    latents, _ = _first_latents(job, clean, timesteps)
    # 0 is mid-grey in -1..1: what these checkpoints were trained to see as missing.
    surroundings = encode(job, image * (mask < 0.5))
    job.models.release("vae_encoder")
    small = _at_latent_size(job, mask).expand(len(surroundings), -1, -1, -1)
    return Prepared(Start(latents, timesteps), channels=torch.cat([small, surroundings], dim=1))


def prepare_blending(job: Job) -> Prepared:
    """For a plain UNet: after every step the part that stays is replaced by the picture at that noise level."""
    image, mask = _image_and_mask(job)
    timesteps = last_part(job.scheduler, job.request.step_count, job.request.change)
    clean = encode(job, image)
    latents, noise = _first_latents(job, clean, timesteps)
    # Diffusers encodes the masked picture here too and throws it away. Drawing what that draws keeps the noise of
    # later steps the same, where a scheduler draws any.
    if job.manifest.latents.drawn:
        job.noise.normal(clean.shape)
    job.models.release("vae_encoder")
    small = _at_latent_size(job, mask)
    return Prepared(Start(latents, timesteps, _blend(job, clean, noise, small, timesteps)))


def _blend(
    job: Job, clean: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor, timesteps: torch.Tensor
) -> AfterStep:
    clean = clean.expand(job.request.pictures, *clean.shape[1:])

    def blend(index: int, latents: torch.Tensor) -> torch.Tensor:
        kept = clean
        if index + 1 < len(timesteps):
            kept = noised(job.scheduler, clean, noise, timesteps[index + 1 : index + 2])
        return (1 - mask) * kept + mask * latents

    return blend


def _image_and_mask(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    if job.request.mask is None:
        raise InputError("in-painting needs a mask: white marks what to paint anew")
    image = images.to_tensor(job.image(), *job.size)
    job.note_size("mask", job.request.mask, job.size)
    return image, images.to_mask(job.request.mask, *job.size)


def _first_latents(
    job: Job, clean: torch.Tensor | None, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pure noise, or the noised picture; and the noise itself."""
    given = job.request.latents
    noise = job.noise.normal(job.latent_shape) if given is None else given.float()
    if clean is None or _from_noise(job):
        return noise * first_level(job.scheduler), noise
    clean = clean.expand(job.request.pictures, *clean.shape[1:])
    first = timesteps[:1].repeat(job.request.pictures)
    return noised(job.scheduler, clean, noise, first), noise


def _from_noise(job: Job) -> bool:
    """As diffusers: pure noise at full strength, though add_noise would leave a trace of the picture; and noise
    that is given is all that there is, whatever the strength."""
    return job.request.change == 1.0 or job.request.latents is not None


def _at_latent_size(job: Job, mask: torch.Tensor) -> torch.Tensor:
    # Nearest, as diffusers: a mask in the latents has no grey edge.
    return interpolate(mask, size=job.latent_size)


SEEING = Task(
    "in-painting",
    channels=9,
    check=check,
    prepare=prepare_seeing,
    description="--image and --mask (white: paint anew), models of an in-painting checkpoint",
    needs=frozenset({"image", "mask"}),
    takes=frozenset({"strength", "latents"}),
    scheduler_settings={"skip_prk_steps": True},
)
BLENDING = replace(
    SEEING,
    name="in-painting by blending",
    channels=4,
    prepare=prepare_blending,
    description="--image and --mask (white: paint anew), any models",
)
