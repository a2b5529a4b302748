"""Classifier-free guidance (Ho and Salimans, 2022, equation 6) through a UNet of any fixed batch size.

A row is one picture with one text. Guided, a picture has two rows, the unconditional text first; else one. Where
what the UNet sees guides as well (Brooks et al., InstructPix2Pix, 2023, equation 3), there are three, in diffusers'
order: prompt and picture, unconditional text and picture, that text and zeros in the place of the picture. Rows are
filled into calls of the UNet's batch size in this order, the last call with repetitions. So a UNet of batch 2 makes
one call per guided picture and one per two pictures without guidance; a UNet of batch 1 makes two, and one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from diffusion_runtime.backends import Model
from diffusion_runtime.control.steering import FEATURE, RESIDUAL, Steer, Steering, steering
from diffusion_runtime.errors import DiffusionError, InputError
from diffusion_runtime.models import not_finite, unfit_latents

EMBEDDED = "timestep_cond"
"""The input of a UNet that takes the guidance scale itself."""


class Predict(Protocol):
    """What the UNet predicts, float32, for the scaled latents of all pictures at a timestep, in step ``index``."""

    def __call__(self, latents: torch.Tensor, timestep: float, index: int = 0) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the UNet is given besides latents and timestep.

    ``rows``: input name -> one value per row, (rows, …). ``channels``: what is concatenated to the latents,
    (pictures or 1, channels, height, width), or None. ``whole``: step -> input name -> what all of its rows
    are given from then on. ``steers``: what ControlNets add in each step."""

    rows: Mapping[str, torch.Tensor]
    channels: torch.Tensor | None = None
    whole: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    steers: tuple[Steer, ...] = ()


def is_guided(guidance_scale: float, image_guidance_scale: float | None = None) -> bool:
    """Guidance is on above 1: at 1 the guided prediction is the text's own. By a picture: as diffusers, only where
    that counts at least as it is."""
    return guidance_scale > 1 and (image_guidance_scale is None or image_guidance_scale >= 1)


def guidance_embedding(scales: torch.Tensor, width: int) -> torch.Tensor:
    """What a UNet with ``timestep_cond`` is told of guidance scales (rows,): (rows, width) float32, sines, then
    cosines, of 1000 (scale - 1) at falling frequencies (Luo et al., Latent Consistency Models, as diffusers has
    it: a UNet that was distilled for a range of scales takes the scale as an input)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scales.float() - 1)[:, None] * frequencies[None]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))


def predictor(
    unet: Model,
    pictures: int,
    conditions: Conditions,
    guidance_scale: float,
    image_guidance_scale: float | None = None,
    controlnets: Sequence[Model] = (),
) -> Predict:
    """The UNet as a function of latents and timestep, guidance applied; ``image_guidance_scale``: by the picture
    that it sees, too. ``controlnets``: the models of the conditions' ``steers``, in order. Buffers are made here,
    once: a call copies the latents into them and nothing else. Raises InputError for inputs that nothing here can
    fill."""
    guided = is_guided(guidance_scale, image_guidance_scale)
    each = 1 if not guided else 2 if image_guidance_scale is None else 3
    rows = pictures * each
    _check_inputs(unet, conditions)
    nets = tuple(zip(conditions.steers, controlnets, strict=True))
    batch = unet.inputs["sample"].shape[0]
    # A fixed batch: what is left over computes the last row again.
    padded = [*range(rows), *[rows - 1] * (-rows % batch)]
    chunks = [padded[start : start + batch] for start in range(0, len(padded), batch)]
    calls = [_call(unet, chunk, each, conditions, nets) for chunk in chunks]

    def predict(latents: torch.Tensor, timestep: float, index: int = 0) -> torch.Tensor:
        outputs = [call.run(latents, timestep, index) for call in calls]
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if len(together) != rows:
            together = together[:rows]
        # One sum in place of a comparison of each element: NaN and infinity reach it.
        if not math.isfinite(together.sum().item()):
            raise _culprit(calls)
        if not guided:
            return together
        if image_guidance_scale is not None:
            text, image, nothing = together[0::3], together[1::3], together[2::3]
            return nothing + guidance_scale * (text - image) + image_guidance_scale * (image - nothing)
        unconditional, text = together[0::2], together[1::2]
        # u + scale (t - u) without an intermediate array.
        return torch.lerp(unconditional, text, guidance_scale)

    return predict


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the UNet: its input arrays, and views of them that change at every step.

    ``sample`` is the part of the input that the latents go into; ``pictures`` says whose they are, as a slice
    where they follow each other, so that no index has to be gathered. ``steering`` fills what ControlNets add."""

    unet: Model
    arrays: Mapping[str, np.ndarray]
    sample: torch.Tensor
    timestep: np.ndarray
    pictures: slice | torch.Tensor
    steering: Steering
    whole: Mapping[int, Mapping[str, torch.Tensor]]

    def run(self, latents: torch.Tensor, timestep: float, index: int) -> torch.Tensor:
        for name, given in self.whole.get(index, {}).items():
            self.arrays[name][...] = given.numpy()
        chosen = latents[self.pictures]
        self.steering.fill(chosen, timestep, index)
        self.sample.copy_(chosen)
        self.timestep.fill(timestep)
        outputs = self.unet(**self.arrays)
        values = outputs["noise_pred"] if "noise_pred" in outputs else next(iter(outputs.values()))
        return torch.from_numpy(values).float()


def _culprit(calls: Sequence[_Call]) -> DiffusionError:
    """The error for a prediction that is not a number: of the latents, of a ControlNet, or else of the UNet."""
    if not all(call.sample.isfinite().all() for call in calls):
        return unfit_latents()
    steered = [array for call in calls for array in call.steering.residuals.values()]
    return not_finite("unet" if all(np.isfinite(array).all() for array in steered) else "a ControlNet")


def _call(
    unet: Model,
    rows: Sequence[int],
    rows_per_picture: int,
    conditions: Conditions,
    nets: Sequence[tuple[Steer, Model]],
) -> _Call:
    specs = unet.inputs
    pictures = [row // rows_per_picture for row in rows]
    arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
    for name, values in conditions.rows.items():
        chosen = values[list(rows)].numpy()
        if chosen.shape != specs[name].shape:
            raise InputError(f"unet: {name} has shape {chosen.shape}, expected {specs[name].shape}")
        arrays[name][...] = chosen
    sample = torch.from_numpy(arrays["sample"])
    taken = sample.shape[1]
    if conditions.channels is not None:
        taken -= conditions.channels.shape[1]
        several = len(conditions.channels) > 1
        sample[:, taken:] = conditions.channels[pictures] if several else conditions.channels
        if rows_per_picture == 3:  # the last row of each sees no picture
            sample[[row % 3 == 2 for row in rows], taken:] = 0.0
    unconditional = [rows_per_picture == 2 and row % 2 == 0 for row in rows]
    steered = steering(nets, arrays, unconditional)
    return _Call(unet, arrays, sample[:, :taken], arrays["timestep"], _span(pictures), steered, conditions.whole)


def _span(pictures: Sequence[int]) -> slice | torch.Tensor:
    if len(set(pictures)) == 1:
        return slice(pictures[0], pictures[0] + 1)  # one picture is copied into every row
    if list(pictures) == list(range(pictures[0], pictures[0] + len(pictures))):
        return slice(pictures[0], pictures[0] + len(pictures))
    return torch.tensor(pictures)


def _check_inputs(unet: Model, conditions: Conditions) -> None:
    filled = {"sample", "timestep", *conditions.rows, *(name for one in conditions.whole.values() for name in one)}
    # Left at zero, residuals change nothing: so a UNet that can be steered draws without ControlNets, too.
    unknown = [name for name in unet.inputs if name not in filled and not name.startswith((RESIDUAL, FEATURE))]
    missing = [name for name in filled if name not in unet.inputs]
    wrong = [f"nothing is known to fill {', '.join(unknown)}"] if unknown else []
    wrong += [f"it has no place for {', '.join(missing)}"] if missing else []
    if wrong:
        raise InputError(f"unet: takes {', '.join(unet.inputs)}; {'; '.join(wrong)}")
