"""What diffusers' pipelines take beyond our own arguments: ``callback_on_step_end``, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from diffusion_runtime.denoising import Start, Step
from diffusion_runtime.errors import InputError

AtStepEnd = Callable[[Any, int, Any, dict[str, Any]], Mapping[str, Any] | None]
"""(pipeline, index, timestep, {"latents": …}) -> {"latents": …} to go on from, or nothing."""


class Neutral(TypedDict, total=False):
    """Arguments of diffusers' pipelines that converted models cannot serve; taken are the values of `NEUTRAL`."""

    timesteps: None
    sigmas: None
    prompt_embeds: None
    negative_prompt_embeds: None
    masked_image_latents: None
    padding_mask_crop: None
    cross_attention_kwargs: None
    clip_skip: int | None
    guidance_rescale: float
    return_dict: bool
    callback: None
    callback_steps: None


NEUTRAL: Mapping[str, object] = dict.fromkeys(Neutral.__annotations__) | {
    "guidance_rescale": 0.0,
    "return_dict": True,
}
"""The values of `Neutral` that change nothing."""


@dataclass(slots=True)
class Handle:
    """What a callback is given as its pipeline; ``pipeline`` is the `Pipeline`. Setting ``_interrupt`` ends the
    loop after this step, and the picture is decoded as it is then: diffusers' way to stop early."""

    pipeline: Any
    scheduler: Any
    num_timesteps: int
    guidance_scale: float
    _interrupt: bool = False

    @property
    def interrupt(self) -> bool:
        return self._interrupt


def refuse(others: Mapping[str, object]) -> None:
    """Raise InputError for arguments that would have no effect, all in one line."""
    unknown = [name for name in others if name not in NEUTRAL]
    unusable = [name for name, value in others.items() if name in NEUTRAL and not _is(value, NEUTRAL[name])]
    if unknown:
        raise InputError(f"unknown argument {', '.join(unknown)}: `help(Pipeline.__call__)` lists what there is")
    if unusable:
        raise InputError(
            f"{', '.join(unusable)}: diffusers has it, this pipeline does not; leave it out, or take diffusers' "
            "own pipeline: load_diffusers_pipeline of diffusion_runtime.diffusers"
        )


def _is(value: object, neutral: object) -> bool:
    """As ``value == neutral``, where an array would compare its elements."""
    return value is neutral if neutral is None else isinstance(value, (bool, int, float)) and value == neutral


def run_steps(
    handle: Handle,
    steps: Generator[Step, torch.Tensor | None, None],
    start: Start,
    on_step: Callable[[Step], None] | None = None,
    callback_on_step_end: AtStepEnd | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
) -> torch.Tensor:
    """Go through the steps of a run that begins at ``start`` and tell both callbacks of each; the last latents.

    Raises InputError where a callback asks for other tensors than the latents or gives latents that do not fit."""
    tensors = list(callback_on_step_end_tensor_inputs)
    if set(tensors) - {"latents"}:
        raise InputError(
            f"callback_on_step_end_tensor_inputs {tensors}: only 'latents' can be had here, others in "
            "load_diffusers_pipeline's pipelines"
        )
    latents, changed = start.latents, None
    try:
        while not handle.interrupt:
            step = steps.send(changed)  # None at first, as a generator wants it that has not begun
            latents, changed = step.latents, None
            if on_step is not None:
                on_step(step)
            if callback_on_step_end is not None:
                given = dict.fromkeys(tensors, latents)
                result = callback_on_step_end(handle, step.index, start.timesteps[step.index], given)
                changed = latents = _checked((result or {}).get("latents", latents), latents)
    except StopIteration:
        pass
    finally:
        steps.close()
    return latents


def _checked(given: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    if tuple(given.shape) != tuple(latents.shape):
        raise InputError(f"callback_on_step_end gave latents {tuple(given.shape)}, expected {tuple(latents.shape)}")
    return given.to(latents)
