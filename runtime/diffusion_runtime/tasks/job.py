"""What a task is given, and what it gives back. A task is what differs between kinds of generation, no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from diffusion_runtime.added_conditions import SizeConditioning
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.control import Control
from diffusion_runtime.denoising import Start
from diffusion_runtime.errors import InputError
from diffusion_runtime.models import Models
from diffusion_runtime.noise import Noise
from diffusion_runtime.numbers import is_number, is_whole
from diffusion_runtime.picture_prompts import PicturePrompt

MAX_GUIDANCE = 1000.0  # beyond it nothing is left of a picture, and float32 ends
DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_STRENGTH, DEFAULT_NOISE_LEVEL = 50, 7.5, 0.8, 20
GIVEN: Mapping[str, str] = {
    "image": "an image",
    "mask": "a mask",
    "depth": "a depth",
    "strength": "a strength",
    "noise_level": "a noise level",
    "image_guidance_scale": "an image guidance scale",
    "latents": "latents",
    "denoising_start": "a denoising_start",
    "denoising_end": "a denoising_end",
}
"""What a request may hold that not every task can use, in words."""


def _check_text(text: object) -> None:
    """Raise InputError for anything but Unicode text: half of a surrogate pair, as bad arguments of a shell become,
    is none."""
    if not isinstance(text, str):
        raise InputError(f"a prompt is a {type(text).__name__}: expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {text[:60]!r} is not valid Unicode at character {error.start + 1}") from error


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. ``prompts`` and ``negative_prompts`` have one entry per picture; no negative prompts are
    empty ones. ``height`` and ``width`` in pixels, None: what the models make.

    ``image`` and ``mask`` are PIL pictures, ``depth`` a picture or (height, width) float32 depths, nearer larger;
    ``strength`` None is 0.8, and 1 with a mask; ``noise_level`` None is 20; ``latents`` are start values drawn by
    the caller, or, with ``denoising_start``, what another model left at its ``denoising_end`` (parts of the steps).
    ``refiner_start`` is the part of the steps after which a refiner goes on. ``steps``, ``guidance_scale`` and
    ``image_guidance_scale`` None are the models' own defaults; ``sizes`` are what SDXL's UNets are told;
    ``picture_prompts`` are for IP-Adapters, ``adapters`` for T2I-Adapters, ``controls`` pictures for ControlNets;
    in ``guess_mode`` these add nothing to the unconditional half, and less to the features of the first layers.
    Raises InputError for what no models could do."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    eta: float = 0.0
    image: Image.Image | None = None
    mask: Image.Image | None = None
    depth: Image.Image | torch.Tensor | None = None
    strength: float | None = None
    noise_level: int | None = None
    latents: torch.Tensor | None = None
    long_prompt: bool = False
    denoising_start: float | None = None
    denoising_end: float | None = None
    refiner_start: float | None = None
    picture_prompts: tuple[PicturePrompt, ...] = ()
    adapters: tuple[Control, ...] = ()
    controls: tuple[Control, ...] = ()
    guess_mode: bool = False
    sizes: SizeConditioning = field(default_factory=SizeConditioning)

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(text, str) for text in self.prompts):
            raise InputError("no prompt: expected a text or a list of texts (an empty text is allowed)")
        for text in (*self.prompts, *self.negative_prompts):
            _check_text(text)
        if len(self.negative_prompts) not in (0, len(self.prompts)):
            raise InputError(
                f"{len(self.negative_prompts)} negative prompts for {len(self.prompts)} prompts: give one, or one "
                "for each"
            )
        self._check_numbers()
        for name in ("long_prompt", "guess_mode"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} {getattr(self, name)!r}: expected True or False")
        self._check_pictures()

    def _check_numbers(self) -> None:
        if self.steps is not None and (not is_whole(self.steps) or self.steps < 1):
            raise InputError(f"{self.steps!r} steps: expected a whole number, at least 1")
        for what, scale, usual in (
            ("guidance scale", self.guidance_scale, "1 to 15"),
            ("image guidance scale", self.image_guidance_scale, "1 to 2.5"),
        ):
            if scale is not None and (not is_number(scale) or abs(scale) > MAX_GUIDANCE):
                raise InputError(f"{what} {scale!r}: expected a number, usually {usual}")
        if not is_number(self.eta) or not 0 <= self.eta <= 1:
            raise InputError(f"eta {self.eta!r}: expected a number, 0 to 1")
        if self.strength is not None and (not is_number(self.strength) or not 0 < self.strength <= 1):
            raise InputError(
                f"strength {self.strength!r}: expected a number, more than 0 (no change) and at most 1 (a new "
                "picture)"
            )
        if self.noise_level is not None and not is_whole(self.noise_level):
            raise InputError(f"noise level {self.noise_level!r}: expected a whole number")
        for name in ("denoising_start", "denoising_end", "refiner_start"):
            part = getattr(self, name)
            if part is not None and (not is_number(part) or not 0 < part < 1):
                raise InputError(f"{name} {part!r}: expected a part of the steps, more than 0 and less than 1")
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and not is_whole(value):
                raise InputError(f"{name} {value!r}: expected a whole number of pixels")

    def _check_pictures(self) -> None:
        if self.guess_mode and not self.controls:
            raise InputError("guess_mode: there is no control picture: give one (--control NAME=PICTURE)")
        for name, value in (("image", self.image), ("mask", self.mask)):
            if value is not None and not isinstance(value, Image.Image):
                raise InputError(f"{name} is a {type(value).__name__}: expected one PIL picture")
        if self.latents is not None and not isinstance(self.latents, torch.Tensor):
            raise InputError(f"latents are a {type(self.latents).__name__}: expected a tensor")
        if self.depth is not None and not isinstance(self.depth, (torch.Tensor, Image.Image)):
            raise InputError(f"depth is a {type(self.depth).__name__}: expected a PIL picture or a tensor")

    @property
    def pictures(self) -> int:
        return len(self.prompts)

    @property
    def given(self) -> frozenset[str]:
        """Which of the keys of `GIVEN` are there."""
        return frozenset(name for name in GIVEN if getattr(self, name) is not None)

    @property
    def step_count(self) -> int:
        """The steps, Stable Diffusion 1's default filled in."""
        return DEFAULT_STEPS if self.steps is None else int(self.steps)  # diffusers' loops want Python's own

    @property
    def scale(self) -> float:
        """The guidance scale, Stable Diffusion 1's default filled in."""
        return DEFAULT_GUIDANCE if self.guidance_scale is None else self.guidance_scale

    @property
    def change(self) -> float:
        """The strength, its default filled in."""
        if self.strength is None:
            return DEFAULT_STRENGTH if self.mask is None else 1.0
        return self.strength

    @property
    def noise(self) -> int:
        """The noise level, its default filled in."""
        return DEFAULT_NOISE_LEVEL if self.noise_level is None else self.noise_level

    def texts(self, guided: bool) -> list[str | None]:
        """One text per row of the UNet's work: guided, the negative prompt (None: there is none) and the prompt of
        each picture; where a picture guides, too, the prompt and twice the negative one."""
        if not guided:
            return list(self.prompts)
        negatives: tuple[str | None, ...] = self.negative_prompts or (None,) * len(self.prompts)
        pairs = zip(negatives, self.prompts, strict=True)
        if self.image_guidance_scale is None:
            return [text for pair in pairs for text in pair]
        return [text for negative, prompt in pairs for text in (prompt, negative, negative)]

    def blind(self, guided: bool) -> list[bool]:
        """Of each row of `texts`, whether it is of the unconditional half, which is told nothing of a picture."""
        if not guided:
            return [False] * self.pictures
        return ([True, False] if self.image_guidance_scale is None else [False, True, True]) * self.pictures


@dataclass(frozen=True, slots=True)
class Job:
    """A request, the models that serve it, and the values that belong to this run alone.

    ``latent_size`` is height and width in latents. ``scheduler`` has its steps set. ``notes`` collects what the
    user should know."""

    request: Request
    manifest: Manifest
    models: Models
    latent_size: tuple[int, int]
    scheduler: Any
    noise: Noise
    notes: list[str] = field(default_factory=list)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(pictures, channels, height, width)"""
        return (self.request.pictures, self.manifest.latents.channels, *self.latent_size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture in pixels."""
        factor = self.manifest.latents.factor
        return self.latent_size[0] * factor, self.latent_size[1] * factor

    def image(self, size: tuple[int, int] | None = None) -> Image.Image:
        """The picture that was given, its size noted where it is not ``size`` (height, width; the result's)."""
        image = self.request.image
        if image is None:
            raise InputError("this task needs a picture: give image (--image)")
        self.note_size("image", image, size or self.size)
        return image

    def note_size(self, what: str, image: Image.Image, size: tuple[int, int]) -> None:
        height, width = size
        note = (
            f"the {what} was resized from {image.width}x{image.height} to {width}x{height}, which these models take"
        )
        if image.size != (width, height) and note not in self.notes:
            self.notes.append(note)


@dataclass(frozen=True, slots=True)
class Prepared:
    """``channels`` (pictures or 1, channels, height, width) are concatenated to the latents in every call of the
    UNet; ``labels`` are inputs with one value for every row, as the upscaler's noise level."""

    start: Start
    channels: torch.Tensor | None = None
    labels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """``channels`` is the UNet's number of input channels, ``needs`` and ``takes`` what must and may be given (keys
    of `GIVEN`), ``description`` one line for the help. ``check`` raises InputError for what it can see without any
    model, before one runs. ``scheduler_settings`` are what diffusers' pipeline for this task imposes on every
    scheduler, beyond what the family's imposes."""

    name: str
    channels: int
    check: Callable[[Job], None]
    prepare: Callable[[Job], Prepared]
    description: str
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)
