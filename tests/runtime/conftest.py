"""Diffusers' pipelines on tiny checkpoints, and their networks as `Model`s: the arithmetic of the runtime is tested
against diffusers without converting anything."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from batches import Here, Make, results
from diffusion_runtime.backends import TensorSpec, check_arrays
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.batch.places import open_place
from diffusion_runtime.batch.run import Batch, prepare, setups
from diffusion_runtime.bundle.manifest import Component, Latents, Manifest, Source, Tensor
from diffusion_runtime.models import Models
from diffusion_runtime.pipeline import Pipeline
from diffusion_runtime.prompt import tokenizer

Arrays = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TorchModel:
    """A torch function with the interface of a converted model: arrays are checked as a backend checks them."""

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    function: Callable[[Arrays], Arrays]

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        check_arrays(self.inputs, arrays, self.name)
        for name, spec in self.inputs.items():
            assert arrays[name].dtype == np.dtype(spec.dtype), name
        with torch.no_grad():
            results = self.function({name: torch.from_numpy(value).float() for name, value in arrays.items()})
        return {name: results[name].numpy().astype(np.float32) for name in self.outputs}


def specs(dtype: str = "float16", /, **shapes: tuple[int, ...]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, shape, dtype) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Reference:
    """A diffusers pipeline in float32 and what the runtime makes of its networks."""

    diffusers: Any
    folder: Path
    latent: tuple[int, int] | None = None

    def of_size(self, height: int, width: int) -> Reference:
        """The same networks, as if they had been converted for another size in pixels."""
        return replace(self, latent=(height // self.factor, width // self.factor))

    def pipeline(
        self, batch_size: int = 2, scheduler: str | None = None, check_safety: bool = True, text_length: int = 77
    ) -> Pipeline:
        loads = {name: (lambda model=model: model) for name, model in self.models(batch_size, text_length).items()}
        clip = tokenizer.load(self.folder / "tokenizer")
        return Pipeline(self.manifest(batch_size, text_length), Models(loads), clip, scheduler, check_safety)

    def manifest(self, batch_size: int, text_length: int = 77) -> Manifest:
        pipe = self.diffusers
        low_res = getattr(pipe, "low_res_scheduler", None)
        return Manifest(
            name="tiny",
            family=self.folder.name.replace("sd1-odd", "sd1"),
            source=Source(name="tiny"),
            kind="packages",
            attention="original",
            height=self.size[0],
            width=self.size[1],
            batch_size=batch_size,
            target="macOS13",
            latents=Latents(
                channels=pipe.vae.config.latent_channels, factor=self.factor, scale=pipe.vae.config.scaling_factor
            ),
            prediction_type=pipe.scheduler.config.prediction_type,
            components={name: _described(model) for name, model in self.models(batch_size, text_length).items()},
            scheduler=_config(self.folder / "scheduler"),
            noise_scheduler=_config(self.folder / "low_res_scheduler") if low_res is not None else None,
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        side = self.diffusers.unet.config.sample_size
        return self.latent or (side, side)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.latent_size[0] * self.factor, self.latent_size[1] * self.factor

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.diffusers.vae.config.block_out_channels) - 1))

    def models(self, batch_size: int, text_length: int = 77) -> dict[str, TorchModel]:
        pipe = self.diffusers
        found = {
            "text_encoder": self._text_encoder(),
            "unet": self._unet(batch_size, text_length),
            "vae_decoder": self._decoder(),
            "vae_encoder": self._encoder(),
        }
        if getattr(pipe, "safety_checker", None) is not None:
            found["safety_checker"] = self._safety_checker()
        if getattr(pipe, "depth_estimator", None) is not None:
            found["depth_estimator"] = self._depth_estimator()
        return found

    def _text_encoder(self) -> TorchModel:
        encoder = self.diffusers.text_encoder

        def run(arrays: Arrays) -> Arrays:
            result = encoder(arrays["input_ids"].long())
            return {"last_hidden_state": result[0], "pooled_outputs": result[1]}

        width = encoder.config.hidden_size
        outputs = specs("float32", last_hidden_state=(1, 77, width), pooled_outputs=(1, width))
        return TorchModel("text_encoder", specs("float32", input_ids=(1, 77)), outputs, run)

    def _unet(self, batch_size: int, text_length: int) -> TorchModel:
        unet = self.diffusers.unet
        size, width = self.latent_size, unet.config.cross_attention_dim
        shapes: dict[str, tuple[int, ...]] = {
            "sample": (batch_size, unet.config.in_channels, *size),
            "timestep": (batch_size,),
            "encoder_hidden_states": (batch_size, width, 1, text_length),
        }
        if unet.config.num_class_embeds is not None:
            shapes["class_labels"] = (batch_size,)

        def run(arrays: Arrays) -> Arrays:
            states = arrays["encoder_hidden_states"].squeeze(2).transpose(1, 2)
            labels = arrays["class_labels"].long() if "class_labels" in arrays else None
            sample, timestep = arrays["sample"], arrays["timestep"]
            return {"noise_pred": unet(sample, timestep, states, class_labels=labels, return_dict=False)[0]}

        outputs = specs("float32", noise_pred=(batch_size, 4, *size))
        return TorchModel("unet", specs(**shapes), outputs, run)

    def _decoder(self) -> TorchModel:
        vae, size = self.diffusers.vae, self.latent_size
        outputs = specs("float32", image=(1, 3, *self.size))
        return TorchModel(
            "vae_decoder",
            specs(z=(1, 4, *size)),
            outputs,
            lambda arrays: {"image": vae.decode(arrays["z"])[0]},
        )

    def _encoder(self) -> TorchModel:
        vae, size = self.diffusers.vae, self.latent_size

        def run(arrays: Arrays) -> Arrays:
            return {"latent": vae.encode(arrays["x"]).latent_dist.parameters}

        inputs = specs(x=(1, 3, *self.size))
        return TorchModel("vae_encoder", inputs, specs("float32", latent=(1, 8, *size)), run)

    def _safety_checker(self) -> TorchModel:
        checker = self.diffusers.safety_checker

        def run(arrays: Arrays) -> Arrays:
            images = [image.numpy() for image in arrays["images"]]
            _, flags = checker(clip_input=arrays["clip_input"], images=images)
            return {"has_nsfw_concepts": torch.tensor(flags).float().reshape(1, 1, 1, 1)}

        inputs = specs(clip_input=(1, 3, 224, 224), images=(1, *self.size, 3), adjustment=(1,))
        return TorchModel("safety_checker", inputs, specs("float32", has_nsfw_concepts=(1, 1, 1, 1)), run)

    def _depth_estimator(self) -> TorchModel:
        estimator = self.diffusers.depth_estimator
        side = estimator.config.image_size

        def run(arrays: Arrays) -> Arrays:
            return {"predicted_depth": estimator(arrays["pixel_values"]).predicted_depth}

        outputs = specs("float32", predicted_depth=(1, side, side))
        return TorchModel("depth_estimator", specs(pixel_values=(1, 3, side, side)), outputs, run)


def _described(model: TorchModel) -> Component:
    inputs, outputs = (
        tuple(Tensor(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in side.values())
        for side in (model.inputs, model.outputs)
    )
    return Component(files=(model.name,), inputs=inputs, outputs=outputs)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "scheduler_config.json").read_text())
    return config


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    """``reference("sd2-v")``: diffusers' own pipeline for a tiny checkpoint of that family, loaded once."""
    import diffusers

    loaded: dict[str, Reference] = {}

    def load(family: str) -> Reference:
        if family not in loaded:
            folder = tiny_checkpoint(family)
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
            pipe.set_progress_bar_config(disable=True)
            loaded[family] = Reference(pipe.to(torch.float32), folder)
        return loaded[family]

    return load


@pytest.fixture(autouse=True, scope="session")
def _models_are_loaded_once(loaded_once: None) -> None:
    """See there."""


@pytest.fixture
def loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load loads: for tests of that."""
    monkeypatch.setattr(TorchBackend, "load", inspect.unwrap(TorchBackend.load))


@pytest.fixture(scope="session")
def dpm2_made_at_once() -> Iterator[None]:
    """diffusers' schedulers of DPM2 look up each timestep of the training when they are made, for 0.2 s each time:
    here once for the same noise levels."""
    import diffusers

    with ExitStack() as patched:
        for kind in (diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler):
            patched.enter_context(mock.patch.object(kind, "_sigma_to_t", _looked_up_once(kind._sigma_to_t)))
        yield


def _looked_up_once(look_up: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[tuple[Any, ...], Any] = {}

    def found(scheduler: Any, *given: Any) -> Any:
        key = tuple((type(one), np.asarray(one).tobytes()) for one in given)
        if key not in known:
            known[key] = look_up(scheduler, *given)
        return known[key]

    return found


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _psnr_db(got: Any, expected: Any) -> float:
    """Of two 8-bit pictures, or two arrays in 0..1."""
    first, second = (np.asarray(image, np.float64) for image in (got, expected))
    peak = 255.0 if np.asarray(got).dtype == np.uint8 else 1.0
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


@pytest.fixture
def psnr_db() -> Callable[[Any, Any], float]:
    return _psnr_db


@pytest.fixture(scope="session")
def toy_folder(build_once: Callable[..., Path]) -> Path:
    """Packages that compute next to nothing, with a manifest; shared, so copy it to change it."""
    import toy_models

    packages = Path("models", "original", "packages")
    return build_once("toy", lambda to: toy_models.write(to / packages)) / packages


@pytest.fixture(scope="session")
def shapes_folder(converted: Callable[[str], Path]) -> Path:
    """The trained checkpoint, converted: packages with original attention. It is shared: do not change it."""
    return converted("shapes")


@pytest.fixture
def make(toy_folder: Path, tmp_path: Path) -> Make:
    """``make(table, place, **defaults)`` makes a batch in this process and returns what results.jsonl says."""

    def made(
        prompts: Path, place: Path, redo: bool = False, ignored: frozenset[str] = frozenset(), **defaults: Any
    ) -> list[dict[str, Any]]:
        of = setups(str(toy_folder), {"backend": "torch"}, str(place), 1, None, None, None)
        target = open_place(str(place))
        with target.hold():
            chosen = {"steps": 2, **defaults}
            plan = prepare(prompts, target, chosen, chosen.pop("count", 1), of, ignored, redo)
            list(Batch(plan, target, Here(of)).run())
        return results(place)

    return made
