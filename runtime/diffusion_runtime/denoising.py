"""The loop: from noise to latents, one step at a time, handed to the caller after each."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_runtime.errors import InputError, first_line
from diffusion_runtime.guidance import Predict
from diffusion_runtime.noise import Noise
from diffusion_runtime.schedulers import ANOTHER, REFUSALS, denoised, name_of, scaled_input, step_arguments

AfterStep = Callable[[int, torch.Tensor], torch.Tensor]
"""(index, latents) -> latents that the next step starts from."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where denoising starts: latents (pictures, channels, height, width) at the level of the first timestep."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    after_step: AfterStep | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of ``total``, done. ``latents`` are after it; ``model_input`` and ``prediction`` what the UNet saw
    and said in it, from which `preview` makes the picture as it will be."""

    index: int
    total: int
    timestep: float
    latents: torch.Tensor
    model_input: torch.Tensor
    prediction: torch.Tensor
    scheduler: Any

    def preview(self) -> torch.Tensor:
        """The clean latents that this step's prediction amounts to."""
        return denoised(self.scheduler, self.model_input, self.prediction, self.timestep)


def denoise(
    predict: Predict, scheduler: Any, start: Start, noise: Noise, eta: float = 0.0
) -> Generator[Step, torch.Tensor | None, None]:
    """Yield after every step; latents that are sent back replace the step's. To cancel, stop asking. The
    scheduler's steps must be set, and are used up.

    Raises DiffusionError where the UNet gives values that are not numbers, InputError where the scheduler cannot
    use what this UNet predicts."""
    arguments = step_arguments(scheduler, noise.generators, eta)
    draws = "generator" in arguments and noise.generators is None
    latents, total = start.latents, len(start.timesteps)
    for index, timestep in enumerate(start.timesteps):
        # Once: every conversion of a tensor to a number costs, and schedulers compare timesteps as tensors.
        number = timestep.item()
        with torch.no_grad():
            model_input = scaled_input(scheduler, latents, timestep)
            prediction = predict(model_input, number, index)
            try:
                if draws:
                    with noise.drawing():
                        latents = scheduler.step(prediction, timestep, latents, **arguments)[0]
                else:
                    latents = scheduler.step(prediction, timestep, latents, **arguments)[0]
            except REFUSALS as error:
                raise InputError(f"scheduler {name_of(scheduler)}: {first_line(error)}; {ANOTHER}") from error
            if start.after_step is not None:
                latents = start.after_step(index, latents)
        changed = yield Step(index, total, number, latents, model_input, prediction, scheduler)
        latents = latents if changed is None else changed
