"""Diffusers' schedulers by the names that people know them by."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    import torch

KARRAS: Mapping[str, Any] = {"use_karras_sigmas": True}
SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A class of diffusers and what is set on top of the checkpoint's own configuration."""

    class_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


SCHEDULERS: Mapping[str, Recipe] = {
    "pndm": Recipe("PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": Recipe("DDIMScheduler"),
    "ddpm": Recipe("DDPMScheduler"),
    "lms": Recipe("LMSDiscreteScheduler"),
    "lms karras": Recipe("LMSDiscreteScheduler", KARRAS),
    "euler": Recipe("EulerDiscreteScheduler"),
    "euler karras": Recipe("EulerDiscreteScheduler", KARRAS),
    "euler-ancestral": Recipe("EulerAncestralDiscreteScheduler"),
    "heun": Recipe("HeunDiscreteScheduler"),
    "heun karras": Recipe("HeunDiscreteScheduler", KARRAS),
    "dpm2": Recipe("KDPM2DiscreteScheduler"),
    "dpm2-ancestral": Recipe("KDPM2AncestralDiscreteScheduler"),
    "dpm++ 2m": Recipe("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++ 2m karras": Recipe(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, **KARRAS}
    ),
    "dpm++ 2m sde": Recipe("DPMSolverMultistepScheduler", SDE),
    "dpm++ 2m sde karras": Recipe("DPMSolverMultistepScheduler", {**SDE, **KARRAS}),
    "dpm++ sde": Recipe("DPMSolverSinglestepScheduler", {**SDE, "lower_order_final": True}),
    "dpm++ sde karras": Recipe("DPMSolverSinglestepScheduler", {**SDE, "lower_order_final": True, **KARRAS}),
    "unipc": Recipe("UniPCMultistepScheduler"),
    "deis": Recipe("DEISMultistepScheduler"),
    "lcm": Recipe("LCMScheduler"),
    "tcd": Recipe("TCDScheduler"),
}


def known() -> str:
    """The names as a list for messages."""
    return ", ".join(SCHEDULERS)


def canonical(name: str) -> str:
    """The name as in `SCHEDULERS`, whatever its case and separators. Raises InputError for an unknown one."""
    wanted = _letters(name)
    for candidate in SCHEDULERS:
        if _letters(candidate) == wanted:
            return candidate
    raise InputError(f"unknown scheduler {name!r}: expected one of {known()}")


def build(config: Mapping[str, Any], name: str | None = None) -> Any:
    """A scheduler with the checkpoint's configuration: the checkpoint's own, or the one called ``name``.

    ``config`` is diffusers' scheduler_config.json. Raises InputError for an unknown name and for a class that is
    not a scheduler of diffusers."""
    import diffusers

    if name is None:
        class_name, settings = str(config.get("_class_name", "PNDMScheduler")), dict[str, Any]()
    else:
        recipe = SCHEDULERS[canonical(name)]
        class_name, settings = recipe.class_name, {**dict.fromkeys(SIGMAS, False), **recipe.settings}
    if not class_name.endswith("Scheduler") or not hasattr(diffusers, class_name):
        raise InputError(f"the models ask for an unknown scheduler class {class_name!r}: choose one of {known()}")
    kind = getattr(diffusers, class_name)
    accepted = inspect.signature(kind.__init__).parameters
    used = {key: value for key, value in {**config, **settings}.items() if key in accepted}
    try:
        return kind.from_config(used)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"scheduler {name or class_name}: {error}") from error


def name_of(scheduler: Any) -> str:
    """The name in `SCHEDULERS` that this scheduler would be asked for by, else its class name."""
    class_name, found = type(scheduler).__name__, ""
    for name, recipe in SCHEDULERS.items():
        expected = {**dict.fromkeys(("use_karras_sigmas",), False), **recipe.settings}
        config = scheduler.config
        if recipe.class_name == class_name and all(config.get(k, v) == v for k, v in expected.items()):
            found = found or name
    return found or class_name


def set_steps(scheduler: Any, steps: int) -> None:
    """Prepare for ``steps`` steps. Raises InputError where the scheduler cannot take so many."""
    most = int(scheduler.config.num_train_timesteps)
    if not isinstance(steps, int) or not 1 <= steps <= most:
        raise InputError(f"{steps} steps: expected 1 to {most}")
    try:
        scheduler.set_timesteps(steps, device="cpu")
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"scheduler {name_of(scheduler)} with {steps} steps: {error}") from error
    stands_still = "solver_order" in scheduler.config and bool((scheduler.sigmas.diff() == 0).any())
    if stands_still or float(scheduler.timesteps.max()) > most - 1:
        raise InputError(f"scheduler {name_of(scheduler)} cannot take as many as {steps} steps: use fewer")


def last_part(scheduler: Any, steps: int, strength: float) -> torch.Tensor:
    """The timesteps that remain when a picture is changed by ``strength`` in (0, 1] instead of made anew."""
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise InputError(f"strength {strength}: expected more than 0 (no change) and at most 1 (a new picture)")
    skipped = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps: torch.Tensor = scheduler.timesteps[skipped:]
    if len(timesteps) == 0 or skipped >= steps * scheduler.order:
        raise InputError(f"strength {strength} of {steps} steps leaves no step: give more strength or more steps")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return timesteps


def step_arguments(scheduler: Any, generators: Any, eta: float) -> dict[str, Any]:
    """What `step` of this scheduler takes beyond prediction, timestep and sample."""
    accepted = inspect.signature(scheduler.step).parameters
    offered = {"eta": eta, "generator": generators, "return_dict": False}
    return {key: value for key, value in offered.items() if key in accepted}


def denoised(scheduler: Any, model_input: torch.Tensor, prediction: torch.Tensor, timestep: float) -> torch.Tensor:
    """The clean latents that a prediction amounts to under any scheduler: ``x0 = (x - sqrt(1 - a) e) / sqrt(a)``
    with ``a`` the cumulative alpha, as ``model_input`` is what the UNet saw (Song et al., DDIM, equation 9)."""
    table = scheduler.alphas_cumprod
    index = min(max(round(timestep), 0), len(table) - 1)
    alpha = float(table[index])
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return math.sqrt(alpha) * model_input - math.sqrt(1 - alpha) * prediction
    if kind == "sample":
        return prediction
    return (model_input - math.sqrt(1 - alpha) * prediction) / math.sqrt(max(alpha, 1e-6))


def _letters(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
