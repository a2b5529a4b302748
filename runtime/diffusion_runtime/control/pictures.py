"""The pictures that ControlNets take: checked, or made of any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from diffusion_runtime import images
from diffusion_runtime.control import Control
from diffusion_runtime.control.canny import canny
from diffusion_runtime.errors import InputError
from diffusion_runtime.tasks.depth_to_image import estimated
from diffusion_runtime.tasks.job import Job


def hint(control: Control, job: Job) -> torch.Tensor:
    """What the ControlNet sees: (1, 3, height, width) float32 in 0..1, as diffusers' pipelines make it.

    A picture that is to be prepared may have any size. Raises InputError for another one that has not the models'
    size: resized lines are grey or gone, so that is left to who made them."""
    height, width = job.size
    rgb = images.in_bytes(control.image).convert("RGB")
    if control.prepare is not None:
        job.note_size(f"picture for {control.prepare}", rgb, job.size)
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
        rgb = PREPARE[control.prepare](rgb, job)
    elif rgb.size != (width, height):
        raise InputError(
            f"control picture {control.name!r} is {rgb.width}x{rgb.height}, expected {width}x{height} (width x "
            "height), as these models make: make it of a picture of that size, or have it made here (--prepare)"
        )
    pixels = torch.from_numpy(np.asarray(rgb, np.float32) / 255.0).permute(2, 0, 1)[None].contiguous()
    return unknown_in_mask(pixels, job) if control.prepare == "inpaint" else pixels


def edges(image: Image.Image) -> Image.Image:
    """Its edges, white on black."""
    return Image.fromarray(canny(np.asarray(image))).convert("RGB")


def unknown_in_mask(pixels: torch.Tensor, job: Job) -> torch.Tensor:
    """With -1 where the mask is white, as ControlNets for in-painting were trained to see what is missing."""
    if job.request.mask is None:
        raise InputError("--prepare inpaint: there is no mask that says what is missing: give one with --mask")
    return torch.where(images.to_mask(job.request.mask, *job.size) > 0, -1.0, pixels)


def depth(image: Image.Image, job: Job) -> Image.Image:
    """Its depth as the models' own estimator sees it, white is nearest: as transformers' depth-estimation makes
    pictures of depths."""
    if "depth_estimator" not in job.models:
        raise InputError(
            "--prepare depth: these models have no depth_estimator: name a folder of models of a depth checkpoint "
            "with --depth-estimator, or give a picture of the depth"
        )
    large = interpolate(estimated(job.models, image), size=job.size, mode="bicubic", align_corners=False)[0, 0]
    nearest, farthest = large.amax(), large.amin()
    if not nearest > farthest:
        raise InputError("--prepare depth: the depth is the same all over: give a picture of the depth")
    grey = (255 * (large - farthest) / (nearest - farthest)).numpy().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


PREPARE: Mapping[str, Callable[[Image.Image, Job], Image.Image]] = {
    "canny": lambda image, _: edges(image),
    "depth": depth,
    "inpaint": lambda image, _: image,  # see `unknown_in_mask`
    "tile": lambda image, _: image,  # ControlNets for tiles take the picture whose details they make anew
}
"""By the names in `PREPARATIONS`, of a picture of the models' size. To add one: a line here, its name there."""
