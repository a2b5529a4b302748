"""The arguments of `Pipeline.__call__` by name, and what it gives back."""

# Without `from __future__ import annotations`: a NamedTuple keeps annotations that are strings as references which
# nobody outside of this module can resolve, pdoc included.

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from PIL import Image

from diffusion_runtime import callbacks, images
from diffusion_runtime.added_conditions import Size
from diffusion_runtime.control import Control
from diffusion_runtime.denoising import Step
from diffusion_runtime.errors import InputError
from diffusion_runtime.noise import Noise, fresh_seed, from_generators, from_seeds
from diffusion_runtime.picture_prompts import Pictures

Texts = str | Sequence[str]
Generators = torch.Generator | Sequence[torch.Generator]
Images = TypeVar("Images")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CONTROL_FIELDS: Mapping[str, str] = {
    "scale": "controlnet_conditioning_scale",
    "start": "control_guidance_start",
    "end": "control_guidance_end",
    "prepare": "control_prepare",
}
"""Fields of a `Control`, and what diffusers' pipelines call them."""


class SizeArguments(TypedDict, total=False):
    """What SDXL's UNets are told of a picture; see `SizeConditioning`, which has the defaults."""

    original_size: Size | None
    crops_coords_top_left: Size
    target_size: Size | None
    negative_original_size: Size | None
    negative_crops_coords_top_left: Size
    negative_target_size: Size | None
    aesthetic_score: float
    negative_aesthetic_score: float


class ControlArguments(TypedDict, total=False):
    """What is asked of ControlNets; see `Pipeline.__call__`."""

    control_image: Image.Image | Sequence[Image.Image] | None
    controlnet: str | Sequence[str] | None
    controlnet_conditioning_scale: float | Sequence[float] | None
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]
    control_prepare: str | Sequence[str | None] | None
    guess_mode: bool


class AdapterArguments(TypedDict, total=False):
    """What is asked of T2I-Adapters; see `Pipeline.__call__`."""

    adapter_image: Image.Image | Sequence[Image.Image] | None
    adapter: str | Sequence[str] | None
    adapter_conditioning_scale: float | Sequence[float]
    adapter_conditioning_factor: float


class PicturePromptArguments(TypedDict, total=False):
    """What IP-Adapters are asked to draw after; see `Pipeline.__call__`."""

    ip_adapter_image: Pictures | None
    ip_adapter_image_embeds: Sequence[torch.Tensor | None] | None
    ip_adapter_scale: float | Sequence[float] | None


class NoiseArguments(TypedDict, total=False):
    """Where random numbers come from."""

    generator: Generators | None
    seed: int | Sequence[int] | None
    rng: str


class StepArguments(TypedDict, total=False):
    """Who is told of each step."""

    on_step: Callable[[Step], None] | None
    callback_on_step_end: callbacks.AtStepEnd | None
    callback_on_step_end_tensor_inputs: Sequence[str]


class RequestArguments(TypedDict, total=False):
    """Fields of a `Request`, which has the defaults, by their names or those of `RENAMED`."""

    mask_image: Image.Image | None
    depth_map: Image.Image | torch.Tensor | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    strength: float | None
    noise_level: int | None
    eta: float
    latents: torch.Tensor | None
    long_prompt: bool
    denoising_start: float | None
    denoising_end: float | None
    refiner_start: float | None


RENAMED: Mapping[str, str] = {"mask_image": "mask", "depth_map": "depth", "num_inference_steps": "steps"}


class Arguments(
    RequestArguments,
    NoiseArguments,
    StepArguments,
    PicturePromptArguments,
    SizeArguments,
    ControlArguments,
    AdapterArguments,
    callbacks.Neutral,
    total=False,
):
    """All arguments of `Pipeline.__call__` but the prompt and ``output_type``."""

    negative_prompt: Texts | None
    image: Image.Image | torch.Tensor | None
    num_images_per_prompt: int


def taken(given: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The arguments of one of the kinds above, which are left out of ``given`` then."""
    return {name: given.pop(name) for name in kind.__annotations__ if name in given}


class Result(NamedTuple, Generic[Images]):
    """``images`` are a list of PIL pictures, or what ``output_type`` asks for: "np" an array (n, height, width, 3)
    in 0..1, "pt" a tensor (n, 3, height, width) in 0..1, "latent" a tensor (n, channels, height, width) of latents.

    ``nsfw_content_detected`` has one entry per picture, or is None where nothing was checked. ``notes`` are for the
    user."""

    images: Images
    nsfw_content_detected: list[bool] | None
    notes: tuple[str, ...] = ()


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output type {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")


def as_output_type(arrays: np.ndarray, output_type: str) -> Any:
    """Pictures (n, height, width, 3) in 0..1 as a caller wants them; "pt" has the colours second, as diffusers'."""
    if output_type == "np":
        return arrays
    return images.to_pil(arrays) if output_type == "pil" else torch.from_numpy(arrays).permute(0, 3, 1, 2)


def controls_of(given: Mapping[str, Any], known: Sequence[str]) -> tuple[Control, ...]:
    """What `ControlArguments` say. ``known``: the names of the ControlNets that there are, of which the only one
    need not be named.

    Raises InputError where there are not as many of one as of the other."""
    images = given.get("control_image")
    if images is None:
        if idle := [name for name, value in given.items() if name != "guess_mode" and value is not None]:
            raise InputError(f"{', '.join(idle)}: there is no control_image: give one for each ControlNet")
        return ()
    several = list(images) if isinstance(images, list | tuple) else [images]
    names = given.get("controlnet")
    if names is None and len(known) == len(several) == 1:
        names = known[0]
    if names is None:
        raise InputError(f"controlnet: name the ControlNets of the control images: {', '.join(known) or 'none'}")
    defaults = {"scale": None, "start": 0.0, "end": 1.0, "prepare": None}
    columns = {
        "name": _for_each("controlnet", names, len(several)),
        **{
            field: _for_each(name, given.get(name, defaults[field]), len(several))
            for field, name in CONTROL_FIELDS.items()
        },
    }
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return tuple(Control(image=image, **row) for image, row in zip(several, rows, strict=True))


def _for_each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each control image: as many as there are, or one for all."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(values) != count or (name == "controlnet" and isinstance(value, str) and count > 1):
        raise InputError(f"{name} {value!r}: expected one for each of the {count} control images")
    return values


def noise_of(
    generator: Generators | None = None, seed: int | Sequence[int] | None = None, rng: str = "torch"
) -> Noise:
    if generator is not None and seed is not None:
        raise InputError("generator and seed are both given: give one")
    if generator is not None:
        return from_generators(generator)
    if seed is None:
        return from_seeds([fresh_seed()], rng)
    given: object = seed
    if isinstance(given, str):  # a sequence too, of digits
        raise InputError(f"seed {seed!r}: expected a whole number, or one for each picture")
    return from_seeds(list(seed) if isinstance(seed, Sequence) else [seed], rng)


def texts_of(prompt: Texts | None, negative: Texts | None, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One prompt and one negative prompt per picture; no negative prompts where none is given."""
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{count!r} pictures per prompt: expected a whole number, at least 1")
    for name, texts in (("prompt", prompt), ("negative prompt", negative or "")):
        if not isinstance(texts, (str, list, tuple)):
            raise InputError(f"{name} is a {type(texts).__name__}: expected a text or a list of texts")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if negative is None:
        return _repeated(prompts, count), ()
    negatives: list[str] = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
    return _repeated(prompts, count), _repeated(negatives, count)


def _repeated(texts: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(text for text in texts for _ in range(count))
