"""A folder as `convert` leaves it, made in milliseconds: the real names and interfaces, a few operations each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffusion_runtime.bundle import integrity, manifest
from diffusion_runtime.bundle.manifest import Component, Latents, Manifest, Palettization, Source, Tensor
from diffusion_runtime.mil.description import serialize
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import write_package
from diffusion_runtime.mil.program import (
    Blob,
    Block,
    DType,
    Feature,
    Function,
    FunctionInterface,
    Metadata,
    Operation,
    Program,
    TensorType,
    Value,
    Variable,
)
from diffusion_runtime.mil.weights import WeightWriter

NAME = "Stable_Diffusion_version_maker_tiny-diffusion-v1-4"
PICTURE = 64
CHANNELS = 32
PORTS: Mapping[str, tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]]] = {
    "text_encoder": ({"input_ids": (1, 77)}, {"last_hidden_state": (1, 77, 8), "pooled_outputs": (1, 8)}),
    "unet": (
        {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 8, 1, 77)},
        {"noise_pred": (2, 4, 8, 8)},
    ),
    "vae_decoder": ({"z": (1, 4, 8, 8)}, {"image": (1, 3, 64, 64)}),
    "vae_encoder": ({"x": (1, 3, 64, 64)}, {"latent": (1, 8, 8, 8)}),
}


def write_bundle(
    folder: Path, attentions: Sequence[str] = ("original", "split_einsum_v2"), nbits: int | None = None
) -> Path:
    """Write ``folder/{attention}/packages`` for each attention, manifests included; return ``folder``."""
    for attention in attentions:
        packages = folder / attention / "packages"
        packages.mkdir(parents=True)
        components = {name: _component(packages, name, attention, nbits) for name in PORTS}
        (packages / "vocab.json").write_text('{"a": 0}')
        (packages / "merges.txt").write_text("#version: 0.2\na b\n")
        told = {"tokenizer_sha256": integrity.tokenizer_hashes(packages, (".",))}
        manifest.write(_manifest(attention, components).model_copy(update=told), packages)
    return folder


def small_model(name: str, einsum: bool) -> tuple[Model, np.ndarray]:
    """A model with the interface of component ``name``: a weight from a file, an einsum or matmul, reshapes."""
    inputs, outputs = PORTS[name]
    weight = np.linspace(-1, 1, CHANNELS, dtype="<f2").reshape(1, CHANNELS)
    stored = Value(TensorType(DType.FLOAT16, (1, CHANNELS)), Blob("@model_path/weights/weight.bin", 64))
    equation = Value(TensorType(DType.STRING), "ab,bc->ac")
    column = Variable("column", TensorType(DType.FLOAT16, (CHANNELS, 1)))
    product = Variable("product", TensorType(DType.FLOAT16, (1, 1)))
    multiply = (
        Operation("einsum", {"equation": (equation,), "values": ("weight", "column")}, (product,))
        if einsum
        else Operation("matmul", {"x": ("weight",), "y": ("column",)}, (product,))
    )
    operations = [
        Operation("const", {}, (Variable("weight", stored.type),), {"val": stored}),
        Operation("const", {}, (Variable("turned", ints(2).type),), {"val": ints(1, 0)}),
        Operation("transpose", {"perm": ("turned",), "x": ("weight",)}, (column,)),
        multiply,
    ]
    for output, shape in outputs.items():
        whole = Value(TensorType(DType.FLOAT16, shape), np.zeros(shape, "<f2"))
        zeros = Variable(f"{output}_zeros", whole.type)
        half = Variable(f"{output}_half", whole.type)
        text = Value(TensorType(DType.STRING), "fp32")
        operations += [
            Operation("const", {}, (zeros,), {"val": Value(whole.type, whole.data)}),
            Operation("add", {"x": (zeros.name,), "y": ("product",)}, (half,)),
            Operation(
                "cast", {"dtype": (text,), "x": (half.name,)}, (Variable(output, TensorType(DType.FLOAT32, shape)),)
            ),
        ]
    half_inputs = name != "text_encoder"
    kind = DType.FLOAT16 if half_inputs else DType.FLOAT32
    variables = tuple(Variable(key, TensorType(kind, shape)) for key, shape in inputs.items())
    function = Function(variables, "CoreML6", {"CoreML6": Block(tuple(operations), tuple(outputs))})
    interface = FunctionInterface(
        "main",
        tuple(
            Feature(key, "multiArray", "Float16" if half_inputs else "Float32", shape)
            for key, shape in inputs.items()
        ),
        tuple(Feature(key, "multiArray", "Float32", shape) for key, shape in outputs.items()),
    )
    about = Metadata("A tiny model", "1", "maker", "mit", {"z": "last", "a": "first"})
    return Model(7, Program({"main": function}), serialize((interface,), about)), weight


def ints(*values: int) -> Value:
    return Value(TensorType(DType.INT32, (len(values),)), np.array(values, "<i4"))


def _component(packages: Path, name: str, attention: str, nbits: int | None) -> Component:
    model, weight = small_model(name, einsum=name == "unet" and attention != "original")
    file = f"{NAME}_{name}.mlpackage"
    weights = packages / "weight.bin"
    with WeightWriter(weights) as writer:
        writer.add(weight, DType.FLOAT16)
    write_package(replace(model), packages / file, weights)
    inputs, outputs = PORTS[name]
    return Component(
        files=(file,),
        inputs=tuple(
            Tensor(name=key, dtype="float32" if name == "text_encoder" else "float16", shape=shape)
            for key, shape in inputs.items()
        ),
        outputs=tuple(Tensor(name=key, dtype="float32", shape=shape) for key, shape in outputs.items()),
        size_bytes=integrity.size_bytes(packages, [file]),
        sha256=integrity.hashes(packages, [file]),
        psnr_db=dict.fromkeys(outputs, 72.5),
        palettization=None if nbits is None or name != "unet" else Palettization(nbits=nbits, worst_snr_db=31.0),
    )


def _manifest(attention: str, components: Mapping[str, Component]) -> Manifest:
    return Manifest(
        name="maker/tiny-diffusion-v1-4",
        family="sd1",
        source=Source(name="maker/tiny-diffusion-v1-4", revision="0" * 40, license="creativeml-openrail-m"),
        kind="packages",
        attention=attention,
        height=PICTURE,
        width=PICTURE,
        batch_size=2,
        target="macOS13",
        latents=Latents(channels=4, factor=8, scale=0.18215),
        prediction_type="epsilon",
        components=dict(components),
        scheduler={"_class_name": "PNDMScheduler"},
        tools={"coremltools": "9.0"},
    )
