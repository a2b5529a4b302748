"""From a picture whose depth is kept: the UNet sees a depth map as a fifth channel."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from diffusion_runtime.errors import InputError
from diffusion_runtime.models import Models
from diffusion_runtime.tasks import image_to_image
from diffusion_runtime.tasks.job import Job, Prepared, Task


def check(job: Job) -> None:
    """As image to image; and the depth must be given or be estimated."""
    image_to_image.check(job)
    if job.request.depth is None and "depth_estimator" not in job.models:
        raise InputError(
            "these models have no depth_estimator: give the depth with --depth-image, or convert again with "
            f"--components {','.join(['depth_estimator', *job.models.loads])}"
        )


def prepare(job: Job) -> Prepared:
    depth = depth_channel(job)
    return Prepared(image_to_image.noised(job), channels=depth)


def depth_channel(job: Job) -> torch.Tensor:
    """(1, 1, height, width) of latents in -1..1, nearer larger: the depth that was given, else estimated."""
    given = job.request.depth
    depth = _given(given) if given is not None else estimated(job.models, job.image())
    small = interpolate(depth, size=job.latent_size, mode="bicubic", align_corners=False)
    nearest, farthest = small.amax(), small.amin()
    if not (torch.isfinite(nearest) and nearest > farthest):
        raise InputError(
            "the depth is the same all over: expected a picture that is brighter where things are nearer"
        )
    return 2.0 * (small - farthest) / (nearest - farthest) - 1.0


def _given(depth: Image.Image | torch.Tensor) -> torch.Tensor:
    if isinstance(depth, torch.Tensor):
        return depth.float().reshape(1, 1, *depth.shape[-2:])
    wide = depth if depth.mode in ("I", "I;16", "F") else depth.convert("L")
    return torch.from_numpy(np.asarray(wide, np.float32).copy())[None, None]


def estimated(models: Models, image: Image.Image) -> torch.Tensor:
    """What the converted estimator (DPT) says of a picture (1, 1, its height, its width), nearer larger. It sees
    the picture in -1..1, resized to its own size bicubically."""
    estimator = models["depth_estimator"]
    (name, spec), *_ = estimator.inputs.items()
    height, width = spec.shape[-2:]
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = (np.asarray(resized, np.float32) / 255.0 - 0.5) / 0.5
    values = estimator.one("predicted_depth", **{name: pixels.transpose(2, 0, 1)[None].astype(spec.dtype)})
    models.release("depth_estimator")
    return torch.from_numpy(values).float().reshape(1, 1, *values.shape[-2:])


TASK = Task(
    "depth to image",
    channels=5,
    check=check,
    prepare=prepare,
    description="--image, models of a depth checkpoint; --depth-image gives the depth instead of estimating it",
    needs=frozenset({"image"}),
    takes=frozenset({"depth", "strength"}),
)
