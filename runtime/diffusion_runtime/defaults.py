"""What diffusers' pipeline for some models takes where a request says nothing."""

from __future__ import annotations

from dataclasses import replace

from diffusion_runtime.families import Family
from diffusion_runtime.tasks import Request

LCM_GUIDANCE_SCALE, LCM_STEPS = 8.5, 4
"""The defaults of diffusers' LatentConsistencyModelPipeline."""


def settled(request: Request, family: Family, takes_guidance: bool) -> Request:
    """The request with the defaults filled in. ``takes_guidance``: the UNet takes the guidance scale as input."""
    if request.controls:  # diffusers has classes of their own for ControlNets
        family = replace(family, **family.controlled)
    scale, strength = family.guidance_scale, family.strength
    steps = family.steps if request.image is None else family.image_steps
    control_scale = family.control_scale if request.image is None else family.image_control_scale
    if request.mask is not None:
        scale, strength = family.inpainting_guidance_scale, family.inpainting_strength
        control_scale = family.inpainting_control_scale
    elif takes_guidance and not family.added_conditions and not request.controls:
        scale, steps = LCM_GUIDANCE_SCALE, LCM_STEPS
    return replace(
        request,
        steps=steps if request.steps is None else request.steps,
        guidance_scale=scale if request.guidance_scale is None else request.guidance_scale,
        image_guidance_scale=family.image_guidance_scale
        if request.image_guidance_scale is None
        else request.image_guidance_scale,
        strength=strength if request.strength is None and request.image is not None else request.strength,
        controls=tuple(replace(one, scale=control_scale) if one.scale is None else one for one in request.controls),
    )
