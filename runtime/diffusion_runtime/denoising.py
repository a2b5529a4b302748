"""The loop: from noise to latents, one step at a time, handed to the caller after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_runtime.errors import InputError, first_line
from diffusion_runtime.guidance import Predict
from diffusion_runtime.noise import Noise
from diffusion_runtime.schedulers import (
    ANOTHER,
    EDM,
    FLOW,
    REFUSALS,
    is_continuous,
    matches_flow,
    name_of,
    scaled_input,
    step_arguments,
)

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


def denoised(scheduler: Any, model_input: torch.Tensor, prediction: torch.Tensor, timestep: float) -> torch.Tensor:
    """The clean latents that a prediction amounts to under any scheduler: ``x0 = (x - sqrt(1 - a) e) / sqrt(a)``
    with ``a`` the cumulative alpha, as ``model_input`` is what the UNet saw (Song et al., DDIM, equation 9). A flow
    points from the picture to the noise: ``x0 = x - sigma v``. Raises InputError for a scheduler that has no such
    table."""
    if scheduler.config.get("prediction_type") == FLOW or matches_flow(scheduler):
        sigma = float(scheduler.sigmas[int((scheduler.timesteps - timestep).abs().argmin())])
        return model_input - sigma * prediction
    if type(scheduler).__name__.startswith(EDM) or is_continuous(scheduler.config):
        return _denoised_by_level(scheduler.config, model_input, prediction, timestep)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"scheduler {name_of(scheduler)} has no previews")
    table = scheduler.alphas_cumprod
    # Schedulers on sigmas have timesteps between the table's.
    index = min(max(round(timestep), 0), len(table) - 1)
    alpha = float(table[index])
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return math.sqrt(alpha) * model_input - math.sqrt(1 - alpha) * prediction
    if kind == "sample":
        return prediction
    # With zero terminal SNR alpha is 0 at the first step, where noise says nothing of the picture.
    return (model_input - math.sqrt(1 - alpha) * prediction) / math.sqrt(max(alpha, 1e-6))


def _denoised_by_level(
    config: Mapping[str, Any], model_input: torch.Tensor, prediction: torch.Tensor, timestep: float
) -> torch.Tensor:
    """c_skip x + c_out F of Karras et al., 2022, table 1, as x is scaled by c_in already. EDM's "epsilon" is F
    itself, "v_prediction" -F."""
    own: float = config.get("sigma_data") or 1.0
    level = math.exp(4 * timestep) / own
    sign = -1 if config["prediction_type"] == "v_prediction" else 1
    return own * (model_input + sign * level * prediction) / math.sqrt(1 + level**2)
