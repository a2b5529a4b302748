"""Models as a pipeline holds them: lazy, timed, freed; chunks joined; rows filled into calls."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_runtime import guidance
from diffusion_runtime.backends import TensorSpec
from diffusion_runtime.control.steering import Steer
from diffusion_runtime.errors import DiffusionError, InputError
from diffusion_runtime.models import Chain, Models, chained


@dataclass(frozen=True)
class Linear:
    """``output = sum of inputs * factor``."""

    takes: Mapping[str, tuple[int, ...]]
    gives: str
    factor: float = 1.0
    seconds: float = 0.0
    seen: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(name, shape, "float16") for name, shape in self.takes.items()}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return {self.gives: TensorSpec(self.gives, next(iter(self.takes.values())), "float32")}

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        self.seen.append({name: value.copy() for name, value in arrays.items()})
        time.sleep(self.seconds)
        total = sum(array.astype(np.float32) for array in arrays.values())
        return {self.gives: np.asarray(total * self.factor, np.float32)}


def test_models_are_loaded_when_first_asked_for_and_once() -> None:
    loaded: list[str] = []

    def load(name: str) -> Any:
        loaded.append(name)
        return Linear({"x": (2,)}, "y")

    models = Models({"unet": partial(load, "unet"), "vae_decoder": partial(load, "vae_decoder")})
    assert loaded == [] and "unet" in models and "other" not in models
    assert models["unet"] is models["unet"]
    assert loaded == ["unet"]
    models.release("unet")
    assert models["unet"] and loaded == ["unet"]


def test_a_missing_model_is_named_with_those_that_are_there() -> None:
    with pytest.raises(InputError, match=r"\(they have: unet\): .* --components vae_encoder,unet$"):
        Models({"unet": partial(Linear, {"x": (1,)}, "y")})["vae_encoder"]


def test_load_first_call_and_steady_time_are_told_apart() -> None:
    def load() -> Linear:
        time.sleep(0.03)
        return Linear({"x": (1,)}, "y", seconds=0.01)

    models = Models({"unet": load})
    for _ in range(3):
        models["unet"](x=np.ones(1, np.float16))
    timing = models.timings["unet"]
    assert timing.calls == 3
    assert timing.load_seconds >= 0.03 and timing.first_call_seconds >= 0.01 and timing.steady_seconds >= 0.01


def test_prewarming_runs_every_model_once() -> None:
    model = Linear({"x": (2, 3)}, "y")
    models = Models({"unet": lambda: model})
    models.prewarm(["unet"])
    assert [call["x"].shape for call in model.seen] == [(2, 3)] and model.seen[0]["x"].dtype == np.float16


def test_values_that_are_no_numbers_name_the_model() -> None:
    models = Models({"vae_decoder": partial(Linear, {"z": (1,)}, "image", float("inf"))})
    with pytest.raises(DiffusionError, match=r"vae_decoder gave values that are not numbers"):
        models["vae_decoder"].one("image", z=np.ones(1, np.float16))


def test_chunks_run_as_one_model() -> None:
    first = Linear({"sample": (2,), "timestep": (2,)}, "hidden", 3.0)
    second = Linear({"hidden": (2,), "timestep": (2,)}, "noise_pred", 2.0)
    chain = chained([lambda: first, lambda: second])()
    assert isinstance(chain, Chain)
    assert list(chain.inputs) == ["sample", "timestep"] and list(chain.outputs) == ["noise_pred"]
    result = chain(sample=np.ones(2, np.float16), timestep=np.full(2, 2, np.float16))
    assert result["noise_pred"].tolist() == [(3 * 3 + 2) * 2] * 2
    assert second.seen[0]["hidden"].dtype == np.float16


def test_a_chain_refuses_what_it_cannot_use() -> None:
    chain = Chain((Linear({"sample": (2,)}, "hidden"), Linear({"hidden": (2,)}, "noise_pred")))
    with pytest.raises(InputError, match="missing sample; unknown hidden"):
        chain(hidden=np.ones(2, np.float16))


def unet(batch: int, **more: tuple[int, ...]) -> Linear:
    return Linear({"sample": (batch, 4, 2, 2), "timestep": (batch, 1, 1, 1), **more}, "noise_pred")


@pytest.mark.parametrize(("batch", "guided", "calls"), [(1, True, 6), (2, True, 3), (4, True, 2), (2, False, 2)])
def test_rows_fill_calls_with_the_unconditional_first(batch: int, guided: bool, calls: int) -> None:
    model = unet(batch, text=(batch, 1, 1, 1))
    rows = torch.arange(6 if guided else 3).float().reshape(-1, 1, 1, 1)
    predict = guidance.predictor(model, 3, guidance.Conditions({"text": rows}), 2.0 if guided else 1.0)
    latents = 100 * torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 4, 2, 2)
    result = predict(latents, 10.0)[:, 0, 0, 0].tolist()
    texts = [value for call in model.seen for value in call["text"][:, 0, 0, 0].tolist()]
    assert len(model.seen) == calls and texts[: len(rows)] == list(range(len(rows)))
    if guided:  # unconditional u = 2i, text t = 2i + 1: u + 2 (t - u) = 2i + 2
        assert result == [100 * i + 10 + 2 * i + 2 for i in range(3)]
    else:
        assert result == [100 * i + 10 + i for i in range(3)]


def test_constant_channels_stand_beside_the_latents() -> None:
    model = Linear({"sample": (2, 6, 2, 2), "timestep": (2, 1, 1, 1)}, "noise_pred")
    channels = torch.full((1, 2, 2, 2), 5.0)
    predict = guidance.predictor(model, 1, guidance.Conditions({}, channels), 7.5)
    predict(torch.ones(1, 4, 2, 2), 0.0)
    predict(torch.zeros(1, 4, 2, 2), 0.0)
    assert model.seen[1]["sample"][:, :4].max() == 0 and (model.seen[1]["sample"][:, 4:] == 5).all()


def test_inputs_that_nothing_can_fill_are_named() -> None:
    model = unet(2, time_ids=(2, 6))
    with pytest.raises(InputError, match="nothing is known to fill time_ids; it has no place for class_labels"):
        guidance.predictor(model, 1, guidance.Conditions({"class_labels": torch.zeros(2)}), 7.5)


@dataclass(frozen=True)
class Constant:
    """Gives the same numbers, whatever it is given."""

    takes: Mapping[str, tuple[int, ...]]
    gives: Mapping[str, float]
    seen: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(name, shape, "float16") for name, shape in self.takes.items()}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(name, (len(self), 1, 1, 1), "float32") for name in self.gives}

    def __len__(self) -> int:
        return self.takes["sample"][0]

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        self.seen.append({name: value.copy() for name, value in arrays.items()})
        return {name: np.full((len(self), 1, 1, 1), value, np.float32) for name, value in self.gives.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_controlnets_see_the_unets_rows_and_the_latents_alone(batch: int) -> None:
    """A UNet to paint in; one ControlNet steers the first step, another both, in the prompt's row."""
    plain = {"timestep": (batch,), "text": (batch, 1, 1, 1)}
    residuals = {f"additional_residual_{number}": (batch, 1, 1, 1) for number in range(2)}
    unet = Constant({"sample": (batch, 9, 2, 2), **plain, **residuals}, {"noise_pred": 0.0})
    takes = {"sample": (batch, 4, 2, 2), **plain, "controlnet_cond": (batch, 3, 16, 16)}
    first = Constant(takes, dict(zip(residuals, (2.0, 3.0), strict=True)))
    second = Constant(takes, dict(zip(residuals, (10.0, 20.0), strict=True)))
    picture = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).half().float()
    steers = (
        Steer("ControlNet_first", picture, (1.0, 0.0)),
        Steer("ControlNet_second", 1 - picture, (0.5, 0.5), guesses=True, text_alone=True),
    )
    texts = torch.tensor([7.0, 8.0]).reshape(-1, 1, 1, 1)
    conditions = guidance.Conditions({"text": texts}, torch.ones(1, 5, 2, 2), steers=steers)
    predict = guidance.predictor(unet, 1, conditions, 2.0, controlnets=(first, second))
    latents = torch.arange(16.0).reshape(1, 4, 2, 2)
    for index, expected in enumerate(((2.0, 2.5, 3.0, 13.0), (0.0, 0.5, 0.0, 10.0))):
        predict(latents, 10.0, index)
        calls = unet.seen[-2 // batch :]
        added = [value for name in residuals for call in calls for value in call[name][:, 0, 0, 0].tolist()]
        assert added == pytest.approx(expected)
    assert len(first.seen) == 2 // batch and len(second.seen) == 4 // batch
    assert [value for call in first.seen for value in call["text"][:, 0, 0, 0]] == [7, 8]
    for call in second.seen:
        assert (call["sample"] == latents.numpy()).all() and (call["timestep"] == 10).all()
        assert np.allclose(call["controlnet_cond"], 1 - picture, atol=1e-3)
