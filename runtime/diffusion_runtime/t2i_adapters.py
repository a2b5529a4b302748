"""T2I-Adapters (Mou et al. 2023): what a picture adds to the UNet's features, computed once for all steps.

As in diffusers' adapter pipelines, what several say is added up, each at its scale. An adapter that counts in a
part of the steps only is left out after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from diffusion_runtime import control, images
from diffusion_runtime.control import Control, ControlFile, chosen
from diffusion_runtime.control.steering import FEATURE
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import several

if TYPE_CHECKING:
    from diffusion_runtime.bundle.manifest import Manifest
    from diffusion_runtime.models import Timed
    from diffusion_runtime.tasks.job import Job, Request

KIND = "t2i_adapter"
"""The kind of component (`families.COMPONENTS`)."""


def names(manifest: Manifest) -> tuple[str, ...]:
    """What the T2I-Adapters of a bundle are called."""
    return tuple(several(KIND, manifest.components))


def of_arguments(given: Mapping[str, Any], manifest: Manifest) -> tuple[Control, ...]:
    """What `arguments.AdapterArguments` say: a picture for each adapter, in the models' order unless they are
    named. Raises InputError."""
    pictures = given.get("adapter_image")
    if pictures is None:
        if idle := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{', '.join(idle)}: there is no adapter_image: give one for each T2I-Adapter")
        return ()
    several_pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    named_ones, scales = given.get("adapter"), given.get("adapter_conditioning_scale", 1.0)
    order = [named_ones] if isinstance(named_ones, str) else list(named_ones or names(manifest))
    each = list(scales) if isinstance(scales, (list, tuple)) else [scales] * len(several_pictures)
    if named_ones is None and len(order) > 1 and len(order) != len(several_pictures):
        raise InputError(f"adapter: name the T2I-Adapter of each picture; there are {', '.join(order)}")
    if not order:
        order = [""] * len(several_pictures)  # `named` says that there are none
    if not len(order) == len(each) == len(several_pictures):
        raise InputError(
            f"{len(several_pictures)} adapter images, {len(order)} names, {len(each)} scales: expected one of each"
        )
    factor = given.get("adapter_conditioning_factor", 1.0)
    rows = zip(order, several_pictures, each, strict=True)
    return tuple(asked(name, picture, scale, factor) for name, picture, scale in rows)


def parse(text: str) -> ControlFile:
    """``canny=edges.png:0.8:0.5``: name, file, scale and factor. Raises InputError for anything else."""
    return control.parse(text, "--adapter", "NAME=PICTURE[:SCALE[:FACTOR]]", ("scale", "end"))


def opened(file: ControlFile) -> Control:
    """With the picture. Raises InputError where it cannot be read."""
    picture = images.load(Path(file.image), f"--adapter {file.name}=")
    return asked(file.name, picture, file.scale, file.end)


def asked(name: str, picture: Image.Image, scale: float | None, factor: float) -> Control:
    """A picture for an adapter. A ``factor`` of 0 is diffusers' way to leave it out. Raises InputError."""
    if factor == 0:
        return Control(name, picture, 0.0)
    return Control(name, picture, scale, end=factor)


def named(request: Request, manifest: Manifest) -> Request:
    """The request with the adapters' full names. Raises InputError for one that is not there, or two pictures for
    one."""
    known = names(manifest)
    if request.adapters and not known:
        raise InputError("these models have no T2I-Adapter: convert again with --t2i-adapter SOURCE")
    adapters = tuple(replace(one, name=chosen(one.name, known, "T2I-Adapter")) for one in request.adapters)
    twice = [
        one.name for index, one in enumerate(adapters) if one.name in [other.name for other in adapters[:index]]
    ]
    if twice:
        raise InputError(f"T2I-Adapter {twice[0]}: has two pictures: one picture for each")
    return replace(request, adapters=adapters)


def features(job: Job, steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """What the UNet's inputs for features become, by the step from which on: at the first, and where an adapter's
    part of the ``steps`` is over. Nothing where there is no picture."""
    components = several(KIND, job.manifest.components)
    said = []
    for one in job.request.adapters:
        scale = 1.0 if one.scale is None else float(one.scale)
        values = _run(job, components[one.name], one)
        said.append((int(steps * one.end), {name: scale * array for name, array in values.items()}))
    return {
        step: _sum([values for end, values in said if end > step], said[0][1])
        for step in sorted({0, *(end for end, _ in said)})
        if said
    }


def _sum(parts: Sequence[Mapping[str, torch.Tensor]], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: sum((one[name] for one in parts), torch.zeros_like(values)) for name, values in like.items()}


def _run(job: Job, component: str, adapter: Control) -> dict[str, torch.Tensor]:
    model = job.models[component]
    (name, spec), *_ = model.inputs.items()
    _, channels, height, width = spec.shape
    job.note_size(f"picture of {adapter.name}", adapter.image, (height, width))
    outputs = _outputs(model, name, _pixels(adapter.image, channels, height, width).astype(spec.dtype))
    job.models.release(component)
    return outputs


def _outputs(model: Timed, name: str, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    outputs = model(**{name: pixels})
    return {key: torch.from_numpy(values).float() for key, values in outputs.items() if key.startswith(FEATURE)}


def _pixels(image: Image.Image, channels: int, height: int, width: int) -> np.ndarray:
    """(1, channels, height, width) in 0..1; grey where the adapter takes one channel."""
    plain = images.in_bytes(image).convert("L" if channels == 1 else "RGB")
    sized = plain if plain.size == (width, height) else plain.resize((width, height), Image.Resampling.LANCZOS)
    values = np.asarray(sized, np.float32).reshape(height, width, channels) / 255.0
    return values.transpose(2, 0, 1)[None]
