"""Golden values of the schedulers: diffusers' latents after every step, with a stand-in for the UNet that both
programs compute alike."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import LMSDiscreteScheduler

from diffusion_runtime import schedulers
from diffusion_runtime.denoising import Start, denoise
from diffusion_runtime.noise import from_seeds

SHAPE = (1, 4, 2, 2)
SEED = 7
STEPS = (4, 10, 30, 50)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
NO_SAMPLES = ("pndm", "euler-ancestral")  # diffusers refuses what predicts samples
MAIN = (
    "pndm", "ddim", "euler", "euler-ancestral", "dpm++ 2m", "dpm++ 2m karras", "dpm++ sde", "heun", "lms", "unipc",
    "lcm",
)  # fmt: skip
OTHERS = ("lms karras", "euler karras", "heun karras", "dpm++ 2m sde", "dpm++ 2m sde karras", "dpm++ sde karras")
CHECKPOINT: Mapping[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
VARIANTS: tuple[tuple[str | None, Mapping[str, Any]], ...] = (
    ("ddim", {"clip_sample": True, "clip_sample_range": 0.5}),
    ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("ddim", {"set_alpha_to_one": True, "steps_offset": 0, "beta_schedule": "linear"}),
    ("ddim", {"beta_schedule": "squaredcos_cap_v2"}),
    ("ddim", {"trained_betas": [0.001 * (i + 1) for i in range(20)], "num_train_timesteps": 20}),
    ("euler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("euler", {"final_sigmas_type": "sigma_min"}),
    ("euler karras", {"sigma_min": 0.1, "sigma_max": 10.0}),
    ("dpm++ 2m", {"solver_type": "heun"}),
    ("dpm++ 2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("dpm++ 2m", {"euler_at_final": True, "lambda_min_clipped": -5.1}),
    ("dpm++ sde", {"solver_type": "heun"}),
    ("unipc", {"solver_order": 3}),
    ("unipc", {"solver_order": 1, "solver_type": "bh1"}),
    ("unipc", {"solver_type": "bh1", "disable_corrector": [0, 2]}),
    ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("lcm", {"original_inference_steps": 100, "timestep_scaling": 8.0}),
    (None, {}),
    (None, {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}),
    (None, {"_class_name": "DDIMScheduler"}),
    (None, {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf")}),
)


def values() -> list[dict[str, Any]]:
    with _coefficients_integrated_once():
        return [*_main(), *_variants(), *_changed()]


def _coefficients_integrated_once() -> Any:
    """Those of LMS take a third of the time, and whatever the network predicts, they are the same."""
    integrate, known = LMSDiscreteScheduler.get_lms_coefficient, dict[tuple[Any, ...], float]()

    @wraps(integrate)
    def once(self: Any, *given: int) -> float:
        asked = (self.sigmas.numpy().tobytes(), *given)
        if asked not in known:
            known[asked] = integrate(self, *given)
        return known[asked]

    return mock.patch.object(LMSDiscreteScheduler, "get_lms_coefficient", once)


def _main() -> Iterator[dict[str, Any]]:
    for name in (*MAIN, *OTHERS):
        for prediction in PREDICTIONS:
            if prediction == "sample" and name in NO_SAMPLES:
                continue
            for spacing in SPACINGS if name in MAIN else SPACINGS[:1]:
                for steps in STEPS:
                    settings = {"prediction_type": prediction, "timestep_spacing": spacing}
                    yield _case(name, {**CHECKPOINT, **settings}, steps)


def _variants() -> Iterator[dict[str, Any]]:
    for name, settings in VARIANTS:
        yield _case(name, {**CHECKPOINT, **settings}, 10)
    yield _case("ddim", CHECKPOINT, 10, eta=0.7)


def _changed() -> Iterator[dict[str, Any]]:
    """A picture that is changed: only the last steps, from a noised start."""
    for name in (*MAIN, *OTHERS):
        yield _case(name, CHECKPOINT, 10, strength=0.65)


def _case(
    name: str | None, config: Mapping[str, Any], steps: int, eta: float = 0.0, strength: float | None = None
) -> dict[str, Any]:
    scheduler = schedulers.build(config, name)
    schedulers.set_steps(scheduler, steps)
    noise = from_seeds([SEED])
    drawn = noise.normal(SHAPE)
    timesteps = scheduler.timesteps
    latents = drawn * float(scheduler.init_noise_sigma)
    if strength is not None:
        timesteps = schedulers.last_part(scheduler, steps, strength)
        latents = scheduler.add_noise(torch.full(SHAPE, 0.5), drawn, timesteps[:1])
    trace = [latents.flatten()]
    for step in denoise(_predict, scheduler, Start(latents, timesteps), noise, eta):
        trace.append(torch.cat([step.latents.flatten()[:3], step.preview().flatten()[:1]]))
    trace.append(step.latents.flatten())
    parts = [timesteps.flatten().float(), *trace]
    return {
        "name": name,
        "config": dict(config),
        "found": schedulers.name_of(scheduler),
        "steps": steps,
        "eta": eta,
        "strength": strength,
        "count": len(timesteps),
        "values": base64.b64encode(torch.cat(parts).numpy().astype("<f4").tobytes()).decode(),
    }


def _predict(latents: torch.Tensor, timestep: float, index: int = 0) -> torch.Tensor:
    """As the Swift test computes it, in float32."""
    return latents * 0.5 + float(np.float32(timestep) * np.float32(0.0005))
