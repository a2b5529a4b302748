"""From what is asked of ControlNets to what they do in each step of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from diffusion_runtime.bundle.manifest import Manifest, Tensor
from diffusion_runtime.control import Control, chosen
from diffusion_runtime.control.pictures import hint
from diffusion_runtime.control.steering import Steer, check_fits, weights
from diffusion_runtime.denoising import Start
from diffusion_runtime.families import several
from diffusion_runtime.tasks.job import Job, Request

KIND, UNET = "controlnet", "control_unet"
"""The kind of component that ControlNets are, and the UNet that they steer (`families.COMPONENTS`)."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One control, checked: the component it is for, and what that sees, (1, 3, height, width) in 0..1."""

    control: Control
    component: str
    hint: torch.Tensor


def names(manifest: Manifest) -> tuple[str, ...]:
    """What the ControlNets of a bundle are called."""
    return tuple(several(KIND, manifest.components))


def named(request: Request, manifest: Manifest) -> Request:
    """The request with the controls' full names. Raises InputError for a ControlNet that is not there."""
    known = names(manifest)
    controls = tuple(replace(control, name=chosen(control.name, known)) for control in request.controls)
    return replace(request, controls=controls)


def planned(job: Job) -> tuple[Planned, ...]:
    """The controls of a job with their pictures. Raises InputError for ControlNets that do not fit the UNet, and
    for pictures that do not fit the models."""
    components = several(KIND, job.manifest.components)
    for control in job.request.controls:
        _check(components[control.name], job.manifest)
    return tuple(Planned(control, components[control.name], hint(control, job)) for control in job.request.controls)


def steers(controls: tuple[Planned, ...], job: Job, start: Start) -> tuple[Steer, ...]:
    """What the ControlNets do in the steps that begin at ``start``."""
    pooled = {name for name, told in job.manifest.controlnets.items() if told.global_pool_conditions}
    pools = [one.control.name in pooled for one in controls]
    # diffusers asks the first of several.
    guesses = job.request.guess_mode or any(pools[:1])
    # Of a run that another model goes on with, the parts are those of all steps, as in diffusers.
    ends_early = job.request.denoising_end is not None
    steps = len(job.scheduler.timesteps if ends_early else start.timesteps)
    return tuple(
        Steer(one.component, one.hint, weights(one.control, steps), guesses and not pool, guesses)
        for one, pool in zip(controls, pools, strict=True)
    )


def _check(component: str, manifest: Manifest) -> None:
    net = manifest.components[component]
    unet = manifest.components[UNET].inputs if UNET in manifest.components else ()
    says = [tensor.name for tensor in net.outputs]
    check_fits(component, _shapes(net.inputs), says, _shapes(unet))


def _shapes(tensors: tuple[Tensor, ...]) -> Mapping[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}
