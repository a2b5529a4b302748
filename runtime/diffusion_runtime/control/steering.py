"""ControlNets in the denoising loop: what they say of the latents is added to the UNet's features.

A ControlNet sees the same rows as the call of the UNet that it steers (see `guidance`), so that models of batch 1
make two calls for a guided picture, and models of batch 2 one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusion_runtime.backends import Model
from diffusion_runtime.control import Control
from diffusion_runtime.errors import InputError

RESIDUAL = "additional_residual_"
"""Inputs of a UNet that is steered and outputs of ControlNets: the down blocks' in order, then the middle's."""
FEATURE = "adapter_state_"
"""Inputs of a UNet for what T2I-Adapters add on the way down, and their outputs."""
HINT = "controlnet_cond"
WEAKEST_GUESS = -1.0  # log10 of the first residual's weight in guess mode; the last one's is 0


@dataclass(frozen=True, slots=True)
class Steer:
    """One ControlNet in one run: the component, its picture (1, 3, height, width) in 0..1, and the weight of what
    it says in each step, 0 where it is not asked.

    ``guesses``: in guess mode the first residuals count less. ``text_alone``: nothing is added to the unconditional
    rows."""

    component: str
    hint: torch.Tensor
    weights: tuple[float, ...]
    guesses: bool = False
    text_alone: bool = False


def weights(control: Control, steps: int) -> tuple[float, ...]:
    """The weight in each of ``steps`` steps, as diffusers has it: a step counts if it is wholly between start and
    end. ``control.scale`` must be known."""
    scale = 1.0 if control.scale is None else float(control.scale)
    return tuple(
        0.0 if index / steps < control.start or (index + 1) / steps > control.end else scale
        for index in range(steps)
    )


@dataclass(frozen=True, slots=True)
class _Net:
    model: Model
    arrays: Mapping[str, np.ndarray]
    sample: torch.Tensor
    timestep: np.ndarray
    weights: tuple[float, ...]
    factors: Mapping[str, np.ndarray]

    def run(self, latents: torch.Tensor, timestep: float) -> dict[str, np.ndarray]:
        self.sample.copy_(latents)
        self.timestep.fill(timestep)
        return self.model(**self.arrays)


@dataclass(frozen=True, slots=True)
class Steering:
    """All ControlNets of one call of the UNet. ``residuals`` are the UNet's inputs that they fill."""

    nets: tuple[_Net, ...]
    residuals: Mapping[str, np.ndarray]

    def fill(self, latents: torch.Tensor, timestep: float, index: int) -> None:
        """Write what the ControlNets add in step ``index`` to scaled latents (rows, channels, height, width)."""
        if not self.nets:
            return
        active = [net for net in self.nets if net.weights[index]]
        said = [(net, net.run(latents, timestep)) for net in active]
        for name, target in self.residuals.items():
            # Summed in float32, in which Apple's clients add several too.
            parts = [
                values[name].astype(np.float32) * (net.factors[name] * net.weights[index]) for net, values in said
            ]
            target[...] = sum(parts, np.float32(0.0))


def steering(
    nets: Sequence[tuple[Steer, Model]],
    unet_arrays: Mapping[str, np.ndarray],
    unconditional: Sequence[bool],
) -> Steering:
    """Buffers for the ControlNets of a call of the UNet whose own are ``unet_arrays``: the states and all else that
    they take are the UNet's. ``unconditional`` says which of its rows are."""
    residuals = {name: array for name, array in unet_arrays.items() if name.startswith(RESIDUAL)}
    return Steering(
        tuple(_net(steer, model, unet_arrays, residuals, unconditional) for steer, model in nets), residuals
    )


def _net(
    steer: Steer,
    model: Model,
    unet_arrays: Mapping[str, np.ndarray],
    residuals: Mapping[str, np.ndarray],
    unconditional: Sequence[bool],
) -> _Net:
    arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in model.inputs.items()}
    for name, array in arrays.items():
        if name == HINT:
            array[...] = steer.hint.numpy()
        elif name not in ("sample", "timestep"):
            array[...] = unet_arrays[name]
    rows = np.array([0.0 if steer.text_alone and blind else 1.0 for blind in unconditional]).reshape(-1, 1, 1, 1)
    # By number: as texts, 10 would come before 2.
    ordered = sorted(residuals, key=lambda name: int(name.removeprefix(RESIDUAL)))
    weights = zip(ordered, guessed(len(ordered), steer.guesses), strict=True)
    factors = {name: (factor * rows).astype(np.float32) for name, factor in weights}
    return _Net(model, arrays, torch.from_numpy(arrays["sample"]), arrays["timestep"], steer.weights, factors)


def guessed(count: int, guesses: bool) -> Sequence[float]:
    """How much each of the residuals counts."""
    return [10.0**power for power in np.linspace(WEAKEST_GUESS, 0.0, count)] if guesses else [1.0] * count


def check_fits(
    component: str, net: Mapping[str, tuple[int, ...]], says: Sequence[str], unet: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise InputError where a ControlNet cannot steer a UNet. ``net`` and ``unet`` are the shapes of their inputs,
    ``says`` the names of the ControlNet's outputs."""
    residuals = {name for name in unet if name.startswith(RESIDUAL)}
    if not residuals:
        raise InputError("these models have no UNet that can be steered: convert again with --controlnet SOURCE")
    strange = [name for name in net if name not in (*unet, HINT)]
    told = {name: shape for name, shape in net.items() if name not in ("sample", HINT, *strange)}
    differing = [
        f"{name} is {shape}, the UNet's {unet[name]}" for name, shape in told.items() if unet[name] != shape
    ]
    if (net["sample"][0], *net["sample"][2:]) != (unet["sample"][0], *unet["sample"][2:]):
        differing.append(f"sample is {net['sample']}, the UNet's {unet['sample']}")
    if set(says) != residuals:
        differing.append(f"it gives {len(says)} residuals, the UNet takes {len(residuals)}")
    if strange:
        differing.append(f"nothing is known to fill {', '.join(strange)}")
    if differing:
        raise InputError(f"{component} does not fit this UNet: {'; '.join(differing)}; convert them together")
