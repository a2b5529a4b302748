"""From a picture, noised as far as ``strength`` says (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

import torch

from diffusion_runtime import images, schedulers
from diffusion_runtime.denoising import Start
from diffusion_runtime.schedulers import between, last_part
from diffusion_runtime.tasks.job import Job, Prepared, Task


def encode(job: Job, image: torch.Tensor) -> torch.Tensor:
    """Latents of a picture (1, 3, height, width) in -1..1, drawn from the encoder's distribution: one for all
    pictures (1, channels, height, width), or one each where each has its own noise."""
    mean, log_variance = moments(job, image)
    latents = job.manifest.latents
    if not latents.drawn:
        return (mean - latents.shift) * latents.scale
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    count = job.request.pictures if job.noise.per_picture else 1
    sample = mean + deviation * job.noise.normal((count, *mean.shape[1:]))
    return (sample - latents.shift) * latents.scale


def moments(job: Job, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance (1, channels, height, width) of a picture's latents, not scaled."""
    encoder = job.models["vae_encoder"]
    (name, spec), *_ = encoder.inputs.items()
    values = encoder.one("latent", **{name: image.numpy().astype(spec.dtype)})
    mean, log_variance = torch.from_numpy(values).float().chunk(2, dim=1)
    return mean, log_variance


def check(job: Job) -> None:
    """The picture must be there, and the strength leave a step."""
    job.image()
    _timesteps(job)


def noised(job: Job) -> Start:
    """The given picture at the noise level that ``strength`` starts from."""
    request = job.request
    timesteps = _timesteps(job)
    clean = encode(job, images.to_tensor(job.image(), *job.size))
    job.models.release("vae_encoder")
    clean = clean.expand(request.pictures, *clean.shape[1:])
    if request.denoising_start is not None:  # the picture is taken to be as noised as that already
        return Start(clean, timesteps)
    noise = job.noise.normal(job.latent_shape)
    first = timesteps[:1].repeat(request.pictures)
    return Start(schedulers.noised(job.scheduler, clean, noise, first), timesteps)


def _timesteps(job: Job) -> torch.Tensor:
    """From the strength on, or from ``denoising_start``, which then says how strong the change is."""
    request, scheduler = job.request, job.scheduler
    if request.denoising_start is None:
        remaining = last_part(scheduler, request.step_count, request.change)
        return between(scheduler, remaining, None, request.denoising_end)
    return between(scheduler, scheduler.timesteps, request.denoising_start, request.denoising_end)


def prepare(job: Job) -> Prepared:
    return Prepared(noised(job))


TASK = Task(
    "image to image",
    channels=4,
    check=check,
    prepare=prepare,
    description="--image, and --strength for how much of it may change",
    needs=frozenset({"image"}),
    takes=frozenset({"strength", "denoising_start", "denoising_end"}),
)
