"""What a task is given, and what it gives back. A task is what differs between kinds of generation, no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffusion_runtime.denoising import Start
    from diffusion_runtime.manifest import Manifest
    from diffusion_runtime.models import Models
    from diffusion_runtime.noise import Noise


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, checked. ``prompts`` has one entry per picture, and so has ``negative_prompts``.

    ``image`` and ``mask`` are PIL pictures, ``depth`` a picture or (height, width) float32 depths, nearer larger;
    ``latents`` start values drawn by the caller (text to image and upscaling)."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    steps: int = 50
    guidance_scale: float = 7.5
    eta: float = 0.0
    image: Image.Image | None = None
    mask: Image.Image | None = None
    depth: Image.Image | torch.Tensor | None = None
    strength: float = 0.8
    noise_level: int = 20
    latents: torch.Tensor | None = None
    long_prompt: bool = False

    @property
    def pictures(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class Job:
    """A request, the models that serve it, and the values that belong to this run alone.

    ``scheduler`` has its steps set. ``notes`` collects what the user should know."""

    request: Request
    manifest: Manifest
    models: Models
    scheduler: Any
    noise: Noise
    notes: list[str] = field(default_factory=list)

    @property
    def latent_size(self) -> tuple[int, int]:
        height, width = self.models["unet"].inputs["sample"].shape[2:]
        return height, width

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
            raise InputError("this task needs an image")
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
    """``channels`` is the UNet's number of input channels, ``needs`` and ``takes`` what must and may be given
    ("image", "mask", "depth"), ``description`` one line for the help."""

    name: str
    channels: int
    prepare: Callable[[Job], Prepared]
    description: str
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
