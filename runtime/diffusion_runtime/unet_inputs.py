"""What a UNet is given of a request beside latents, timestep and states, as far as it takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from diffusion_runtime import guidance, picture_prompts, t2i_adapters
from diffusion_runtime.added_conditions import SizeConditioning
from diffusion_runtime.backends import Model
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.control.steering import FEATURE
from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    from diffusion_runtime.tasks import Job

Shapes = Mapping[str, tuple[int, ...]]
STATES = "encoder_hidden_states"


def shapes(manifest: Manifest, unet: Callable[[], Model]) -> dict[str, tuple[int, ...]]:
    """Of all inputs of a UNet by name: from the manifest where it lists them, else ``unet`` is loaded."""
    described = manifest.unet
    listed = described.inputs if described is not None and described.inputs else unet().inputs.values()
    found = {tensor.name: tensor.shape for tensor in listed}
    for name in ("sample", STATES):
        if len(found.get(name, ())) != 4:
            raise InputError(f"unet: expected an input {name} of four dimensions, got {found.get(name)}")
    return found


def of_rows(job: Job, unet: Shapes, pooled: torch.Tensor | None, guided: bool) -> dict[str, torch.Tensor]:
    """In each row: SDXL's sizes and pooled text, the guidance scale, IP-Adapters' tokens of pictures. ``unet``: the
    shapes of its inputs."""
    request = job.request
    told: dict[str, torch.Tensor] = {}
    if "text_embeds" in unet:
        if pooled is None:
            raise InputError("unet: takes text_embeds, but the last text encoder gives no pooled_outputs")
        told["text_embeds"] = pooled.reshape(-1, *unet["text_embeds"][1:])  # (rows, width) or (rows, width, 1, 1)
    if "time_ids" in unet:
        ids, negative = request.sizes.time_ids(job.size, unet["time_ids"][-1])
        each = [negative, ids] if guided else [ids]
        if guided and request.image_guidance_scale is not None:
            each = [ids, ids, ids]  # diffusers' class for it has no sizes of a negative prompt
        told["time_ids"] = torch.stack(each * request.pictures)
    elif request.sizes != SizeConditioning():
        raise InputError("original_size, target_size, aesthetic_score, …: these models are told none: leave it out")
    blind = request.blind(guided)
    if guidance.EMBEDDED in unet:
        scales = torch.full((len(blind),), request.scale)
        told[guidance.EMBEDDED] = guidance.guidance_embedding(scales, unet[guidance.EMBEDDED][-1])
    return told | picture_prompts.told(job.manifest, job.models, request.picture_prompts, unet, blind)


def whole(job: Job, unet: Shapes, timesteps: int) -> dict[int, dict[str, torch.Tensor]]:
    """In all rows at once, from which step on: how much each IP-Adapter counts, what T2I-Adapters add.
    ``timesteps``: those of the run, more than the request's steps with some schedulers."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    if any(name.startswith(FEATURE) for name in unet):  # not of a refiner beside such a UNet
        found |= t2i_adapters.features(job, min(timesteps, job.request.step_count))
    if picture_prompts.SCALE in unet:
        scales = picture_prompts.scales(job.manifest, job.request.picture_prompts)
        found[0] = {**found.get(0, {}), picture_prompts.SCALE: scales}
    return found
