"""Pictures as prompts, through IP-Adapters (Ye et al. 2023): encoded once, then tokens that the UNet attends to.

The image encoder and the projections are models of their own; the UNet takes each adapter's tokens, and how much
each counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
Pictures = Image.Image | Sequence[Image.Image | Sequence[Image.Image] | None]
"""One for each IP-Adapter, or several for some."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PicturePrompt:
    """``image`` for the IP-Adapter ``name`` (None: the first that no other is for); it counts ``scale`` (None: 1).

    ``embeds`` in its place: what diffusers' `prepare_ip_adapter_image_embeds` gives of one adapter, (2, 1, …) with
    guidance, the unconditional half first, (1, 1, …) without; (…, n, …) of n pictures. ``more``: further pictures
    for the same adapter. Raises InputError for what no adapter could use."""

    image: Image.Image | None = None
    name: str | None = None
    scale: float | None = None
    embeds: torch.Tensor | None = None
    more: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        given: tuple[Any, ...] = self.image, *self.more
        if strange := [one for one in given if not isinstance(one, Image.Image | None)]:
            kind = type(strange[0]).__name__
            raise InputError(
                f"ip_adapter_image is a {kind}: expected one PIL picture for each IP-Adapter, or a list"
            )
        embeds: Any = self.embeds
        if embeds is not None and not isinstance(embeds, torch.Tensor):
            raise InputError(f"ip_adapter_image_embeds has a {type(embeds).__name__}: expected tensors")
        if (self.image is None) == (self.embeds is None):
            raise InputError(
                "ip_adapter_image or ip_adapter_image_embeds: expected one of them for each IP-Adapter"
            )
        if self.scale is not None and not (is_number(self.scale) and abs(self.scale) <= MAX_SCALE):
            raise InputError(f"IP-Adapter scale {self.scale!r}: expected a number, usually 0 to 1")

    @property
    def count(self) -> int:
        """How many pictures it is."""
        return 1 + len(self.more) if self.embeds is None else int(self.embeds.shape[1])


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
        else _of_one(one, scale, embeds is not None)
        for one, scale in zip(several, each, strict=True)
    )


def _of_one(given: Any, scale: Any, is_embeds: bool) -> PicturePrompt:
    if is_embeds:
        return PicturePrompt(scale=scale, embeds=given)
    first, *more = given if isinstance(given, (list, tuple)) and given else [given]
    return PicturePrompt(first, scale=scale, more=tuple(more))


def parse(text: str) -> ControlFile:
    """``plus=face.png:0.6``, or a file alone: name, file and scale. Raises InputError for anything else."""
    return control.parse(text, "--ip-adapter-image", "[NAME=]PICTURE[:SCALE]", ("scale",), needs_name=False)


def opened(file: ControlFile) -> PicturePrompt:
    """With the picture. Raises InputError where it cannot be read."""
    picture = images.load(Path(file.image), "--ip-adapter-image")
    return PicturePrompt(picture, file.name or None, file.scale)


def placed(manifest: Manifest, prompts: Sequence[PicturePrompt]) -> dict[int, PicturePrompt]:
    """Each prompt by its adapter's place; those for one adapter are one of several pictures. Raises InputError
    where there is no such adapter."""
    names = [adapter.name for adapter in manifest.ip_adapters]
    if prompts and not names:
        raise InputError("these models have no IP-Adapter: convert again with --ip-adapter FILE")
    found: dict[int, PicturePrompt] = {}
    for prompt in prompts:
        free = [index for index in range(len(names)) if index not in found]
        known = f"these models have {', '.join(names)}"
        if prompt.name is None:
            if not free and len(names) > 1:
                raise InputError(f"{len(prompts)} pictures for IP-Adapters, but {known}: name them: NAME=PICTURE")
            place = free[0] if free else 0
        else:
            place = _place(prompt.name, names, known)
        found[place] = prompt if place in free else _together(found[place], prompt, names[place])
    return found


def _together(first: PicturePrompt, second: PicturePrompt, name: str) -> PicturePrompt:
    if second.image is None or first.image is None or second.scale not in (None, first.scale):
        raise InputError(f"IP-Adapter {name}: its pictures have two scales: give the scale with the first alone")
    return replace(first, more=(*first.more, second.image, *second.more))


def _place(name: str, names: Sequence[str], known: str) -> int:
    """By its whole name, or by a part that only one has."""
    alike = [index for index, one in enumerate(names) if one == name]
    alike = alike or [index for index, one in enumerate(names) if name.lower() in one.lower()]
    if len(alike) != 1:
        raise InputError(f"IP-Adapter {name!r}: {'several are' if alike else 'none is'} called so; {known}")
    return alike[0]


def _most(manifest: Manifest, unet: Shapes, place: int) -> int:
    """How many pictures the UNet takes of an adapter."""
    name = f"{TOKENS}{place}"
    (one,) = (output for output in manifest.components[PROJECTION].outputs if output.name == name)
    return unet[name][-1] // one.shape[-1]


def check(manifest: Manifest, models: Models, prompts: Sequence[PicturePrompt], guided: bool, unet: Shapes) -> None:
    """Raises InputError for what can be seen before any model runs. ``unet``: the shapes of its inputs."""
    found = placed(manifest, prompts)
    missing = [name for name in (ENCODER, PROJECTION) if found and name not in models]
    if PROJECTION in missing or (missing and any(prompt.image is not None for prompt in found.values())):
        raise InputError(
            f"these models have no {missing[0]}, which an IP-Adapter needs: convert again with all parts"
        )
    halves = 2 if guided else 1
    for place, prompt in found.items():
        if prompt.embeds is not None and (prompt.embeds.ndim < 3 or len(prompt.embeds) != halves):
            raise InputError(
                f"ip_adapter_image_embeds have shape {tuple(prompt.embeds.shape)}: expected ({halves}, 1, …), "
                + ("unconditional and conditional, " if guided else "")
                + "of one picture"
            )
        # Fewer are repeated: as often for each, which attention takes for once.
        if (most := _most(manifest, unet, place)) % max(prompt.count, 1):
            raise InputError(
                f"IP-Adapter {manifest.ip_adapters[place].name}: {prompt.count} pictures, but these models take "
                f"{most} of each: convert again with --ip-adapter-pictures {prompt.count}"
            )


def encode(
    manifest: Manifest, models: Models, prompts: Sequence[PicturePrompt], guided: bool, unet: Shapes
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of each adapter its tokens in the unconditional and in the conditional rows, by the UNet's inputs; the first
    are empty where nothing is guided. Zeros for adapters without a picture."""
    projection, found = models[PROJECTION], placed(manifest, prompts)
    told: tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]] = [], []
    for number in range(max(prompt.count for prompt in found.values())):
        halves: list[dict[str, np.ndarray]] = [
            {name: np.zeros(spec.shape, np.float32) for name, spec in projection.inputs.items()} for _ in range(2)
        ]
        for place, prompt in found.items():
            name = f"{EMBEDS}{place}"
            embeds = _embeds(models, prompt, number % prompt.count, projection.inputs[name].shape)
            halves[1][name], halves[0][name] = embeds
        for half, tokens in list(zip(halves, told, strict=True))[not guided :]:
            tokens.append(_projected(projection, half))
    models.release(ENCODER, PROJECTION)
    counts = {f"{TOKENS}{place}": prompt.count for place, prompt in found.items()}
    unconditional, conditional = (
        {
            name: _repeated([one[name] for one in tokens[: counts.get(name, 1)]], unet[name])
            for name in (tokens[0] if tokens else ())
        }
        for tokens in told
    )
    return unconditional, conditional


def _repeated(pictures: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The tokens of all pictures side by side, as often as fill the UNet's input."""
    together = torch.cat(list(pictures), dim=-1)
    return together.repeat(1, 1, 1, shape[-1] // together.shape[-1])


def _embeds(
    models: Models, prompt: PicturePrompt, number: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """What the projection takes of a prompt's picture ``number``, and of none."""
    if prompt.embeds is None:
        pictures = [one for one in (prompt.image, *prompt.more) if one is not None]
        return _encoded(models[ENCODER], pictures[number], whole=len(shape) == 2)
    given = prompt.embeds.detach().float().numpy()
    if given.shape[2:] != shape[1:]:
        raise InputError(f"ip_adapter_image_embeds have shape {given.shape}: expected (…, 1, {shape[1:]})")
    return given[-1, number : number + 1], given[0, number : number + 1]


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
    unconditional, conditional = encode(manifest, models, prompts, any(blind), unet)
    return {name: torch.cat([(unconditional if one else conditional)[name] for one in blind]) for name in shapes}
