"""Pictures as prompts, through IP-Adapters (Ye et al. 2023): encoded once, then tokens that the UNet attends to.

The image encoder and the projections are models of their own; the UNet takes each adapter's tokens, and how much
each counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from diffusion_runtime import control, images
from diffusion_runtime.control import ControlFile
from diffusion_runtime.errors import InputError
from diffusion_runtime.numbers import is_number
from diffusion_runtime.safety import clip_input

if TYPE_CHECKING:
    from diffusion_runtime.bundle.manifest import Manifest
    from diffusion_runtime.models import Models, Timed

TOKENS, SCALE = "image_tokens_", "ip_adapter_scale"
"""Inputs of a UNet with IP-Adapters: the tokens of each, by its place among them, and the scales of all."""
EMBEDS = "image_embeds_"
ENCODER, PROJECTION = "image_encoder", "image_projection"
MAX_SCALE = 100.0
Pictures = Image.Image | Sequence[Image.Image | None]
"""One for each IP-Adapter."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PicturePrompt:
    """``image`` for the IP-Adapter ``name`` (None: the first that no other is for); it counts ``scale`` (None: 1).

    ``embeds`` in its place: what diffusers' `prepare_ip_adapter_image_embeds` gives of one adapter, (2, 1, …) with
    guidance, the unconditional half first, (1, 1, …) without. Raises InputError for what no adapter could use."""

    image: Image.Image | None = None
    name: str | None = None
    scale: float | None = None
    embeds: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given: tuple[Any, Any] = self.image, self.embeds
        if given[0] is not None and not isinstance(given[0], Image.Image):
            raise InputError(
                f"ip_adapter_image is a {type(given[0]).__name__}: expected one PIL picture for each IP-Adapter"
            )
        if given[1] is not None and not isinstance(given[1], torch.Tensor):
            raise InputError(f"ip_adapter_image_embeds has a {type(given[1]).__name__}: expected tensors")
        if (self.image is None) == (self.embeds is None):
            raise InputError(
                "ip_adapter_image or ip_adapter_image_embeds: expected one of them for each IP-Adapter"
            )
        if self.scale is not None and not (is_number(self.scale) and abs(self.scale) <= MAX_SCALE):
            raise InputError(f"IP-Adapter scale {self.scale!r}: expected a number, usually 0 to 1")


def of_arguments(given: Mapping[str, Any]) -> tuple[PicturePrompt, ...]:
    """What `arguments.PicturePromptArguments` ask for: a picture or a tensor of embeds for each adapter, None for
    one that is not used, and one scale, or one for each. Raises InputError."""
    images, embeds = given.get("ip_adapter_image"), given.get("ip_adapter_image_embeds")
    scales, used = given.get("ip_adapter_scale"), images if embeds is None else embeds
    if images is not None and embeds is not None:
        raise InputError("ip_adapter_image and ip_adapter_image_embeds are both given: give one")
    if used is None:
        if scales is not None:
            raise InputError("ip_adapter_scale: there is no ip_adapter_image: give one for each IP-Adapter")
        return ()
    several = list(used) if isinstance(used, (list, tuple)) else [used]
    if isinstance(scales, dict) or (isinstance(scales, (list, tuple)) and any(isinstance(s, dict) for s in scales)):
        raise InputError("ip_adapter_scale by block: converted models take one number for each IP-Adapter")
    each = list(scales) if isinstance(scales, (list, tuple)) else [scales] * len(several)
    if len(each) != len(several):
        raise InputError(f"{len(each)} IP-Adapter scales for {len(several)} pictures: give one, or one for each")
    return tuple(
        # In the place of one that is not used a black picture keeps the order, and counts nothing.
        PicturePrompt(Image.new("RGB", (1, 1)), scale=0.0)
        if one is None
        else PicturePrompt(one if embeds is None else None, None, scale, None if embeds is None else one)
        for one, scale in zip(several, each, strict=True)
    )


def parse(text: str) -> ControlFile:
    """``plus=face.png:0.6``, or a file alone: name, file and scale. Raises InputError for anything else."""
    return control.parse(text, "--ip-adapter-image", "[NAME=]PICTURE[:SCALE]", ("scale",), needs_name=False)


def opened(file: ControlFile) -> PicturePrompt:
    """With the picture. Raises InputError where it cannot be read."""
    picture = images.load(Path(file.image), "--ip-adapter-image")
    return PicturePrompt(picture, file.name or None, file.scale)


def placed(manifest: Manifest, prompts: Sequence[PicturePrompt]) -> dict[int, PicturePrompt]:
    """Each prompt by its adapter's place. Raises InputError where there is no such adapter, or two are for one."""
    names = [adapter.name for adapter in manifest.ip_adapters]
    if prompts and not names:
        raise InputError("these models have no IP-Adapter: convert again with --ip-adapter FILE")
    found: dict[int, PicturePrompt] = {}
    for prompt in prompts:
        free = [index for index in range(len(names)) if index not in found]
        known = f"these models have {', '.join(names)}"
        if prompt.name is None:
            if not free:
                raise InputError(f"{len(prompts)} pictures for IP-Adapters, but {known}: one picture for each")
            place = free[0]
        else:
            place = _place(prompt.name, names, known)
        if place not in free:
            raise InputError(f"IP-Adapter {names[place]}: has two pictures: one picture for each")
        found[place] = prompt
    return found


def _place(name: str, names: Sequence[str], known: str) -> int:
    """By its whole name, or by a part that only one has."""
    alike = [index for index, one in enumerate(names) if one == name]
    alike = alike or [index for index, one in enumerate(names) if name.lower() in one.lower()]
    if len(alike) != 1:
        raise InputError(f"IP-Adapter {name!r}: {'several are' if alike else 'none is'} called so; {known}")
    return alike[0]


def check(manifest: Manifest, models: Models, prompts: Sequence[PicturePrompt], guided: bool) -> None:
    """Raises InputError for what can be seen before any model runs."""
    found = placed(manifest, prompts)
    missing = [name for name in (ENCODER, PROJECTION) if found and name not in models]
    if PROJECTION in missing or (missing and any(prompt.image is not None for prompt in found.values())):
        raise InputError(
            f"these models have no {missing[0]}, which an IP-Adapter needs: convert again with all parts"
        )
    halves = 2 if guided else 1
    for prompt in found.values():
        if prompt.embeds is not None and tuple(prompt.embeds.shape[:2]) != (halves, 1):
            raise InputError(
                f"ip_adapter_image_embeds have shape {tuple(prompt.embeds.shape)}: expected ({halves}, 1, …), "
                + ("unconditional and conditional, " if guided else "")
                + "of one picture"
            )


def encode(
    manifest: Manifest, models: Models, prompts: Sequence[PicturePrompt], guided: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of each adapter its tokens in the unconditional and in the conditional rows, by the UNet's inputs; the first
    are empty where nothing is guided. Zeros for adapters without a picture."""
    projection = models[PROJECTION]
    halves: list[dict[str, np.ndarray]] = [
        {name: np.zeros(spec.shape, np.float32) for name, spec in projection.inputs.items()} for _ in range(2)
    ]
    for place, prompt in placed(manifest, prompts).items():
        name = f"{EMBEDS}{place}"
        shape = projection.inputs[name].shape
        if prompt.embeds is not None:
            given = prompt.embeds.detach().float().numpy()
            if given.shape[2:] != shape[1:]:
                raise InputError(f"ip_adapter_image_embeds have shape {given.shape}: expected (…, 1, {shape[1:]})")
            halves[1][name], halves[0][name] = given[-1], given[0]
        elif prompt.image is not None:
            halves[1][name], halves[0][name] = _encoded(models[ENCODER], prompt.image, whole=len(shape) == 2)
    unconditional, conditional = (
        _projected(projection, half) if half is not None else {}
        for half in (halves[0] if guided else None, halves[1])
    )
    models.release(ENCODER, PROJECTION)
    return unconditional, conditional


def _encoded(encoder: Timed, image: Image.Image, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder says of a picture, and of none: zeros for the ``whole`` picture, and what it says of a black
    one, after normalisation, for each patch. So diffusers has it."""
    (name, spec), *_ = encoder.inputs.items()
    pixels = clip_input(image, spec.shape[-1]).astype(spec.dtype)
    if whole:
        embeds = encoder.one("image_embeds", **{name: pixels})
        return embeds, np.zeros_like(embeds)
    given, none = (encoder.one("hidden_states", **{name: values}) for values in (pixels, np.zeros_like(pixels)))
    return given, none


def _projected(projection: Timed, embeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    arrays = {name: values.astype(projection.inputs[name].dtype) for name, values in embeds.items()}
    outputs = projection(**arrays)
    return {name: torch.from_numpy(values).float() for name, values in outputs.items() if name.startswith(TOKENS)}


def scales(manifest: Manifest, prompts: Sequence[PicturePrompt]) -> torch.Tensor:
    """(adapters,): 0 for those without a picture."""
    found = placed(manifest, prompts)
    used = {place: 1.0 if prompt.scale is None else float(prompt.scale) for place, prompt in found.items()}
    return torch.tensor([used.get(place, 0.0) for place in range(len(manifest.ip_adapters))])


def told(
    manifest: Manifest, models: Models, prompts: Sequence[PicturePrompt], unet: Shapes, blind: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """What the UNet takes of pictures in each row: ``blind`` says of each whether it is of the unconditional half.
    Without any picture nothing is encoded."""
    shapes = {name: shape for name, shape in unet.items() if name.startswith(TOKENS)}
    if not prompts or not shapes:
        return {name: torch.zeros(len(blind), *shape[1:]) for name, shape in shapes.items()}
    unconditional, conditional = encode(manifest, models, prompts, any(blind))
    return {name: torch.cat([(unconditional if one else conditional)[name] for one in blind]) for name in shapes}
