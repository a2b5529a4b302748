"""Models with Stable Diffusion's interfaces that compute next to nothing: everything around models is tested with
them in no time. Text states are sines of the token numbers, the UNet mixes its inputs, the VAE scales pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_runtime.bundle import manifest
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.mil import description
from diffusion_runtime.mil.package import open_package, specification_path
from diffusion_runtime.mil.program import FunctionInterface, Metadata
from diffusion_runtime.mil.proto import write_model

WIDTH, LATENT, SIZE = 8, 8, 64
APPLE = "Stable_Diffusion_version_toy_"
SCHEDULER: Mapping[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def write(folder: Path, batch: int = 2, has_refiner: bool = False) -> Path:
    """A folder of packages as `convert` writes it: Apple's names, a tokenizer, a manifest. With a refiner there are
    two text encoders, as of SDXL, of which the refiner's UNet takes the second one's states."""
    import tiny_checkpoints

    folder.mkdir(parents=True)
    ids = (manifest.Tensor(name="input_ids", dtype="float16", shape=(1, 77)),)  # tells how many encoders there are
    components = {
        name: manifest.Component(
            files=(_save(folder / f"{APPLE}{name}.mlpackage", program),),
            inputs=ids if has_refiner and name.startswith("text_encoder") else (),
            outputs=(),
        )
        for name, program in programs(batch, has_refiner).items()
    }
    source = manifest.Source(name="toy", revision="0" * 40)
    tiny_checkpoints.write_tokenizer(folder)
    made = manifest.Manifest(
        name="toy",
        family="sdxl" if has_refiner else "sd1",  # defaults are those of its refiner
        source=source,
        kind="packages",
        attention="original",
        height=SIZE,
        width=SIZE,
        batch_size=batch,
        target="macOS13",
        latents=manifest.Latents(channels=4, factor=SIZE // LATENT, scale=0.18215),
        prediction_type="epsilon",
        components=components,
        scheduler=dict(SCHEDULER),
        refiner=manifest.Refiner(source=source, scheduler=dict(SCHEDULER), prediction_type="v_prediction")
        if has_refiner
        else None,
    )
    manifest.write(made, folder)
    return folder


def chunks(folder: Path, batch: int = 2) -> None:
    """The UNet of `programs` as two packages, in place of the whole one's."""
    mb, specs = _builder()

    def first(sample: Any, timestep: Any) -> Any:
        times = mb.reshape(x=mb.mul(x=timestep, y=np.float16(0.001)), shape=(batch, 1, 1, 1))
        return mb.add(x=mb.mul(x=sample, y=np.float16(0.5)), y=times, name="hidden")

    def second(hidden: Any, encoder_hidden_states: Any) -> Any:
        text = mb.reduce_mean(x=encoder_hidden_states, axes=[1, 2, 3], keep_dims=True)
        return mb.add(x=hidden, y=text, name="noise_pred")

    sample = (batch, 4, LATENT, LATENT)
    _save(folder / f"{APPLE}unet_chunk1.mlpackage", specs(first, sample, (batch,)))
    _save(folder / f"{APPLE}unet_chunk2.mlpackage", specs(second, sample, (batch, WIDTH, 1, 77)))


def nan_unet(folder: Path, batch: int = 2) -> None:
    """Replace the UNet by one with a weight that is not a number."""
    mb, specs = _builder()

    def unet(sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        text = mb.reduce_mean(x=encoder_hidden_states, axes=[1, 2, 3], keep_dims=True)
        times = mb.reshape(x=timestep, shape=(batch, 1, 1, 1))
        weight = np.full((1, 4, 1, 1), np.nan, np.float16)
        return mb.add(x=mb.mul(x=sample, y=weight), y=mb.add(x=text, y=times), name="noise_pred")

    path = folder / f"{APPLE}unet.mlpackage"
    shutil.rmtree(path)
    _save(path, specs(unet, (batch, 4, LATENT, LATENT), (batch,), (batch, WIDTH, 1, 77)))


def described(path: Path) -> Path:
    """A package whose author wrote something into it and which takes x of two shapes, the tanh of which is y."""
    mb, specs = _builder()
    _save(path, specs(lambda x: mb.tanh(x=x, name="y"), (1, 2)))
    package = open_package(path)
    (x,), outputs = package.model.interface.inputs, package.model.interface.outputs
    interface = FunctionInterface("main", (replace(x, enumerated_shapes=((1, 2), (3, 2))),), outputs)
    about = Metadata("Two shapes", "1.2", "Å. Author", "MIT", {"coreml_sd.key": "value"})
    text = description.serialize((interface,), about)
    write_model(replace(package.model, description=text), specification_path(path))
    return path


def programs(batch: int, has_refiner: bool = False) -> dict[str, Any]:
    """MIL programs by component name."""
    mb, specs = _builder()

    def text_encoder(input_ids: Any) -> Any:
        numbers = mb.mul(x=mb.expand_dims(x=input_ids, axes=[-1]), y=np.arange(1, WIDTH + 1, dtype=np.float16) / 7)
        return mb.sin(x=numbers, name="last_hidden_state")

    def unet(sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        times = mb.reshape(x=mb.mul(x=timestep, y=np.float16(0.001)), shape=(batch, 1, 1, 1))
        text = mb.reduce_mean(x=encoder_hidden_states, axes=[1, 2, 3], keep_dims=True)
        hidden = mb.add(x=mb.mul(x=sample, y=np.float16(0.5)), y=times)
        return mb.add(x=hidden, y=text, name="noise_pred")

    def vae_decoder(z: Any) -> Any:
        colours = mb.slice_by_index(x=z, begin=[0, 0, 0, 0], end=[1, 3, LATENT, LATENT])
        factor = float(SIZE // LATENT)
        large = mb.upsample_nearest_neighbor(x=colours, scale_factor_height=factor, scale_factor_width=factor)
        return mb.tanh(x=mb.mul(x=large, y=np.float16(0.2)), name="image")

    def vae_encoder(x: Any) -> Any:
        kernel = [SIZE // LATENT] * 2
        small = mb.avg_pool(x=x, kernel_sizes=kernel, strides=kernel, pad_type="valid")
        rest = np.full((1, 5, LATENT, LATENT), -8, np.float16)
        return mb.concat(values=[small, rest], axis=1, name="latent")

    encoders = ["text_encoder", "text_encoder_2"] if has_refiner else ["text_encoder"]
    unets = {"unet": len(encoders) * WIDTH, **({"refiner": WIDTH} if has_refiner else {})}
    sample = (batch, 4, LATENT, LATENT)
    return {
        **{name: specs(text_encoder, (1, 77)) for name in encoders},
        **{name: specs(unet, sample, (batch,), (batch, width, 1, 77)) for name, width in unets.items()},
        "vae_decoder": specs(vae_decoder, (1, 4, LATENT, LATENT)),
        "vae_encoder": specs(vae_encoder, (1, 3, SIZE, SIZE)),
    }


def _builder() -> tuple[Any, Any]:
    coremltools = import_coremltools()
    mb = import_coremltools("converters.mil").Builder
    half = import_coremltools("converters.mil.mil.types").fp16

    def specs(function: Any, *shapes: tuple[int, ...]) -> Any:
        inputs = [mb.TensorSpec(shape, dtype=half) for shape in shapes]
        return mb.program(input_specs=inputs, opset_version=coremltools.target.iOS16)(function)

    return mb, specs


def _save(path: Path, program: Any) -> str:
    coremltools = import_coremltools()
    model = coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=coremltools.precision.FLOAT16,
        pass_pipeline=coremltools.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path.name
