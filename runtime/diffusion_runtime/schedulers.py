"""Diffusers' schedulers by the names that people know them by."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from diffusion_runtime.errors import InputError, first_line
from diffusion_runtime.families import PLAIN_SETTINGS, UNET, family_named
from diffusion_runtime.later import import_diffusers

if TYPE_CHECKING:
    import torch

REFUSALS = (
    *(ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError, AssertionError),
    ImportError,
)
"""What diffusers' schedulers raise for settings that they cannot use, and for libraries that are not there."""
EMPTY: Mapping[str, Any] = {}
KARRAS: Mapping[str, Any] = {"use_karras_sigmas": True}
SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
FLOW = "flow_prediction"
LEAST_SIGNAL = 1e-3
"""The least cumulative alpha of a schedule whose v predictions become noise predictions. At its last step a
scheduler multiplies what float16 has lost by sqrt(1 / alpha); at 0, of a zero terminal SNR, noise predictions tell
nothing of the picture."""
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
FLOW_MATCH = "FlowMatch"
"""How diffusers' classes for flow matching alone begin: Stable Diffusion 3's."""
EDM = "EDM"
"""How diffusers' classes for the noise levels of Karras et al. (2022) begin: Playground v2.5's."""


_NEEDED = ("config", "order", "init_noise_sigma", "set_timesteps", "scale_model_input", "step")
"""What diffusers' Stable Diffusion pipelines use of a scheduler."""
_NEEDED_FOR_FLOW = ("config", "order", "set_timesteps", "scale_noise", "step")
"""What StableDiffusion3Pipeline and its kin use."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A class of diffusers and what is set on top of the checkpoint's own configuration."""

    class_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


SCHEDULERS: Mapping[str, Preset] = {
    "pndm": Preset("PNDMScheduler"),
    "ddim": Preset("DDIMScheduler"),
    "ddpm": Preset("DDPMScheduler"),
    "lms": Preset("LMSDiscreteScheduler"),
    "lms karras": Preset("LMSDiscreteScheduler", KARRAS),
    "euler": Preset("EulerDiscreteScheduler"),
    "euler karras": Preset("EulerDiscreteScheduler", KARRAS),
    "euler-ancestral": Preset("EulerAncestralDiscreteScheduler"),
    "heun": Preset("HeunDiscreteScheduler"),
    "heun karras": Preset("HeunDiscreteScheduler", KARRAS),
    "dpm2": Preset("KDPM2DiscreteScheduler"),
    "dpm2-ancestral": Preset("KDPM2AncestralDiscreteScheduler"),
    "dpm++ 2m": Preset("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++ 2m karras": Preset(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, **KARRAS}
    ),
    "dpm++ 2m sde": Preset("DPMSolverMultistepScheduler", SDE),
    "dpm++ 2m sde karras": Preset("DPMSolverMultistepScheduler", {**SDE, **KARRAS}),
    "dpm++ sde": Preset("DPMSolverSinglestepScheduler", {**SDE, "lower_order_final": True}),
    "dpm++ sde karras": Preset("DPMSolverSinglestepScheduler", {**SDE, "lower_order_final": True, **KARRAS}),
    "unipc": Preset("UniPCMultistepScheduler"),
    "deis": Preset("DEISMultistepScheduler"),
    "lcm": Preset("LCMScheduler"),
    "tcd": Preset("TCDScheduler"),
}


ANOTHER = "choose another scheduler, or other settings of it"


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


def imposed_on(family: str, takes_guidance: bool = False) -> Mapping[str, Any]:
    """The settings that a family's pipeline imposes on every scheduler. Where the UNet takes the guidance scale,
    StableDiffusionPipeline's place is LatentConsistencyModelPipeline's, which imposes none."""
    settings = family_named(family).scheduler_settings
    return {} if takes_guidance and settings is PLAIN_SETTINGS else settings


def check_family(config: Mapping[str, Any], family: str) -> None:
    """Raise InputError for a checkpoint's configuration that networks of its family cannot be run with."""
    if family_named(family).denoiser == UNET and is_flow_match(config):
        raise InputError(
            f"scheduler {config['_class_name']}: does not scale what the network is given, which UNets, as these "
            "models', need; diffusers cannot run it with them either"
        )


def settled(config: Mapping[str, Any], imposed: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration as diffusers' pipeline uses it: with the settings that the pipeline's class
    imposes (`imposed_on`) in place of what the file says or leaves out."""
    return {**config, **{key: value for key, value in imposed.items() if _is_wrong(config, key, value)}}


def _is_wrong(config: Mapping[str, Any], key: str, value: Any) -> bool:
    """Diffusers replaces ``clip_sample`` and ``skip_prk_steps`` where they are exactly the other truth value, and
    ``steps_offset`` where it is anything else."""
    if key not in config:
        return True
    return config[key] is (not value) if isinstance(value, bool) else config[key] != value


def build(config: Mapping[str, Any], name: str | None = None, imposed: Mapping[str, Any] = EMPTY) -> Any:
    """A scheduler with the checkpoint's configuration: the checkpoint's own, or the one called ``name``.

    ``config`` is diffusers' scheduler_config.json, ``imposed`` what the pipeline's class imposes on any scheduler.
    Keys that only other classes know are kept in the scheduler's ``config``, as diffusers keeps them, for a
    scheduler that is made from it. Raises InputError for an unknown name and for a class that is not a scheduler of
    diffusers."""
    diffusers = import_diffusers()

    if name is None:
        class_name, settings = str(config.get("_class_name", "PNDMScheduler")), dict[str, Any]()
    else:
        preset = SCHEDULERS[canonical(name)]
        # A name says what the sigmas are: those of the checkpoint's own scheduler do not carry over.
        class_name, settings = preset.class_name, {**dict.fromkeys(SIGMAS, False), **preset.settings}
    if not class_name.endswith("Scheduler") or not hasattr(diffusers, class_name):
        raise InputError(f"the models ask for an unknown scheduler class {class_name!r}: choose one of {known()}")
    kind = getattr(diffusers, class_name)
    _check_noise_levels(config, class_name)
    # Of keys that no class understands diffusers warns each time.
    # Of the presets none is for flow matching, so its classes would have no use for what they know.
    others = () if class_name.startswith(FLOW_MATCH) else SCHEDULERS.values()
    kinds = {kind, *(getattr(diffusers, preset.class_name) for preset in others)}
    understood = frozenset[str]().union(*map(_arguments, kinds))
    wanted = {**settled(config, imposed), **settings}
    try:
        made = kind.from_config({key: value for key, value in wanted.items() if key in understood})
    except REFUSALS as error:
        raise InputError(f"scheduler {name or class_name}: {first_line(error)}; {ANOTHER}") from error
    if not _steps(made):
        raise InputError(f"scheduler {class_name} is for another kind of pipeline: choose one of {known()}")
    return made


def alphas_cumprod(config: Mapping[str, Any], family: str) -> torch.Tensor:
    """The schedule of a configuration, as diffusers computes it for the family: float32 (training steps,)."""
    alphas: torch.Tensor = build(config, None, imposed_on(family)).alphas_cumprod
    return alphas


def has_signal(config: Mapping[str, Any], family: str) -> bool:
    """Whether v predictions of this schedule can become noise predictions at every timestep."""
    made = build(config, None, imposed_on(family))
    has_table = has_usual_noise(config) and hasattr(made, "alphas_cumprod")
    return has_table and bool(made.alphas_cumprod[-1] >= LEAST_SIGNAL)


def has_usual_noise(config: Mapping[str, Any]) -> bool:
    """Whether the UNet is told its noise level as one of the training's timesteps, as Stable Diffusion's are.
    EDM's (Playground v2.5, CosXL) are told the logarithm of a continuous one; those trained by flow matching mix
    picture and noise in another way."""
    is_flow = config.get("prediction_type") == FLOW or bool(config.get("use_flow_sigmas"))
    return not (is_flow or is_continuous(config) or str(config.get("_class_name")).startswith(EDM))


def is_flow_match(config: Mapping[str, Any]) -> bool:
    """Whether this is one of diffusers' classes for flow matching alone, as Stable Diffusion 3's: they take latents
    as they are, at the level of noise, and mix noise in by `scale_noise`."""
    return str(config.get("_class_name")).startswith(FLOW_MATCH)


def is_continuous(config: Mapping[str, Any]) -> bool:
    """As EulerDiscreteScheduler reads it: with other predictions timesteps stay those of the training."""
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def _check_noise_levels(config: Mapping[str, Any], class_name: str) -> None:
    """Raise InputError for a scheduler that would take the models' noise levels for the usual ones."""
    own = str(config.get("_class_name"))
    if own == class_name or (own.startswith(EDM) and class_name.startswith(EDM)):
        return
    _check_flow(class_name, config)
    if own.startswith(EDM) or is_continuous(config):
        raise InputError(
            f"these models were trained with EDM's noise levels, which {class_name} does not have: leave the "
            f"scheduler out, for their own {own}"
        )


def _steps(scheduler: Any) -> bool:
    """Whether a step takes a prediction, a timestep and a sample, and needs nothing else."""
    if not all(hasattr(scheduler, name) for name in _needed(scheduler)):
        return False
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    return "num_train_timesteps" in scheduler.config and not any(
        one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters[3:]
    )


def _needed(scheduler: object) -> tuple[str, ...]:
    return _NEEDED_FOR_FLOW if matches_flow(scheduler) else _NEEDED


def matches_flow(scheduler: object) -> bool:
    """`is_flow_match` of a scheduler."""
    return type(scheduler).__name__.startswith(FLOW_MATCH)


def scaled_input(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the network is given of the latents: of flow matching, all of them as they are."""
    scaled: torch.Tensor = latents if matches_flow(scheduler) else scheduler.scale_model_input(latents, timestep)
    return scaled


def first_level(scheduler: Any) -> float:
    """What noise of unit variance is multiplied by before the first step."""
    return 1.0 if matches_flow(scheduler) else float(scheduler.init_noise_sigma)


def noised(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Clean latents at the noise levels of ``timesteps``, one of each picture."""
    mixed: torch.Tensor = (
        scheduler.scale_noise(clean, timesteps, noise)
        if matches_flow(scheduler)
        else scheduler.add_noise(clean, noise, timesteps)
    )
    return mixed


def check(scheduler: object, config: Mapping[str, Any] = EMPTY) -> None:
    """Raise InputError for anything but a scheduler of diffusers that this loop can run with models whose own
    scheduler has ``config``."""
    lacking = [name for name in _needed(scheduler) if not hasattr(scheduler, name)]
    if lacking or isinstance(scheduler, type):
        raise InputError(
            f"scheduler is a {getattr(scheduler, '__name__', type(scheduler).__name__)}: expected a scheduler of "
            "diffusers, as X.from_config(pipeline.scheduler.config) makes it"
            + (f" (it has no {', '.join(lacking)})" if lacking else "")
        )
    _check_flow(type(scheduler).__name__, config)


def _check_flow(class_name: str, config: Mapping[str, Any]) -> None:
    """Raise InputError for a scheduler of flow matching for models that were not trained so, and the other way."""
    if class_name.startswith(FLOW_MATCH) != is_flow_match(config):
        raise InputError(
            f"{class_name} does not fit models of {config.get('_class_name')}: those that were trained by flow "
            "matching need a scheduler for it, and no others do: leave the scheduler out"
        )


def own(scheduler: Any, imposed: Mapping[str, Any]) -> Any:
    """A copy of a scheduler for one run, with what the task imposes: schedulers count their steps."""
    # Multistep schedulers keep the predictions of earlier steps: a run that was left would reach into the next.
    taken = copy.deepcopy(scheduler)
    changes = {key: value for key, value in imposed.items() if _is_wrong(taken.config, key, value)}
    taken.register_to_config(**{key: value for key, value in changes.items() if key in taken.config})
    return taken


@cache
def _arguments(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}  # type: ignore[misc]


def name_of(scheduler: Any) -> str:
    """The name in `SCHEDULERS` that this scheduler would be asked for by, else its class name."""
    class_name, found = type(scheduler).__name__, ""
    for name, preset in SCHEDULERS.items():
        expected = {**dict.fromkeys(SIGMAS, False), **preset.settings}
        config = scheduler.config
        if preset.class_name == class_name and all(config.get(k, v) == v for k, v in expected.items()):
            found = found or name
    return found or class_name


def recorded(scheduler: Any) -> str | None:
    """The name by which the scheduler can be asked for again; None: the models' own, for which there is none."""
    name = name_of(scheduler)
    return name if name in SCHEDULERS else None


def set_steps(scheduler: Any, steps: int, patches: int = 0) -> None:
    """Prepare for ``steps`` steps. ``patches``: how many the network cuts the latents into, by which the noise
    levels of some schedulers of flow matching are shifted. Raises InputError where the scheduler cannot take so
    many."""
    most = scheduler.config.num_train_timesteps
    if not isinstance(most, int):
        raise InputError(
            f"scheduler {name_of(scheduler)}: num_train_timesteps is {most!r}: expected a whole number"
        )
    if not isinstance(steps, int) or not 1 <= steps <= most:
        raise InputError(f"{steps} steps: expected 1 to {most}")
    try:
        scheduler.set_timesteps(steps, device="cpu", **_shift(scheduler, patches))
    except REFUSALS as error:
        said = f"scheduler {name_of(scheduler)} with {steps} steps: {first_line(error)}"
        raise InputError(f"{said}; {ANOTHER}") from error
    # All but the last one, where there is no step any more: some solvers repeat their last noise level there.
    # A configuration may keep another class's solver_order.
    solves = "solver_order" in scheduler.config and hasattr(scheduler, "sigmas")
    stands_still = solves and bool((scheduler.sigmas[:-1].diff() == 0).any())
    # Timesteps are places in the schedule, but those of consistency models, which have none: they come of sigmas.
    beyond = hasattr(scheduler, "alphas_cumprod") and float(scheduler.timesteps.max()) > most - 1
    if stands_still or beyond:
        raise InputError(f"scheduler {name_of(scheduler)} cannot take as many as {steps} steps: use fewer")


def _shift(scheduler: Any, patches: int) -> dict[str, float]:
    """diffusers' ``mu``: a line through two numbers of patches and their shifts, as StableDiffusion3Pipeline draws
    it."""
    config = scheduler.config
    if not (matches_flow(scheduler) and config.get("use_dynamic_shifting")):
        return {}
    # The pipeline's defaults, not the scheduler's: where a configuration leaves them out, the pipeline's count.
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
    slope = (most - least) / (high - low)
    return {"mu": patches * slope + least - slope * low}


def last_part(scheduler: Any, steps: int, strength: float) -> torch.Tensor:
    """The timesteps that remain when a picture is changed by ``strength`` in (0, 1] instead of made anew."""
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise InputError(f"strength {strength}: expected more than 0 (no change) and at most 1 (a new picture)")
    # As diffusers' get_timesteps: int() cuts (Stable Diffusion 3's later than the others' does), and schedulers of
    # order 2 list each step twice.
    done = min(steps * strength, steps) if matches_flow(scheduler) else min(int(steps * strength), steps)
    skipped = int(max(steps - done, 0)) * scheduler.order
    timesteps: torch.Tensor = scheduler.timesteps[skipped:]
    if len(timesteps) == 0 or skipped >= steps * scheduler.order:
        raise InputError(f"strength {strength} of {steps} steps leaves no step: give more strength or more steps")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return timesteps


def between(scheduler: Any, timesteps: torch.Tensor, start: float | None, end: float | None) -> torch.Tensor:
    """Of ``timesteps``, those from ``start`` to ``end``, parts of the way from noise (0) to picture (1), as
    diffusers' ``denoising_start`` and ``denoising_end`` choose them. Raises InputError where none is left."""
    total = int(scheduler.config.num_train_timesteps)
    chosen = timesteps
    if start is not None:
        count = int((chosen < round(total - start * total)).sum())
        if scheduler.order == 2 and count % 2 == 0:  # never between the two halves of a step
            count += 1
        chosen = chosen[len(chosen) - count :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(len(scheduler.timesteps) - count)
    if end is not None:
        chosen = chosen[: int((chosen >= round(total - end * total)).sum())]
    if len(chosen) == 0:
        raise InputError(f"no step lies between denoising_start {start} and denoising_end {end}: use more steps")
    return chosen


def step_arguments(scheduler: Any, generators: Any, eta: float) -> dict[str, Any]:
    """What `step` of this scheduler takes beyond prediction, timestep and sample."""
    accepted = inspect.signature(scheduler.step).parameters
    offered = {"eta": eta, "generator": generators, "return_dict": False}
    return {key: value for key, value in offered.items() if key in accepted}


def _letters(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
