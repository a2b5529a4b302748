"""Palettized packages: coremltools reads them, the torch backend runs them, and broken input is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_convert.palettize import palette
from diffusion_convert.palettize.checked import palettize_checked
from diffusion_convert.palettize.outputs import seeded_inputs
from diffusion_convert.palettize.palettize_options import PER_GROUPED_CHANNEL, PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import DiffusionError, InputError, PackageError, UnsupportedError, VerificationError
from diffusion_runtime.mil.package import open_package, write_package
from diffusion_runtime.mil.packing import packed_size
from diffusion_runtime.mil.program import Block, DType, Operation, TensorType, Value, operations

Package = Callable[..., Path]
WEIGHTS = {"wide", "up", "rows", "mixed"}


def dense_weights(path: Path) -> dict[str, np.ndarray]:
    """Constants by name as coremltools' own loader decompresses them; palettized ones alone."""
    ct = import_coremltools()
    load = import_coremltools("converters.mil.frontend.milproto.load").load
    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    found: dict[str, np.ndarray] = {}
    for function in program.functions.values():
        for operation in function.operations:
            if operation.op_type == "constexpr_lut_to_dense":
                found[operation.outputs[0].name] = np.array(operation.materialized_val_inference())
    return found


def float_weights(path: Path) -> dict[str, np.ndarray]:
    package = open_package(path)
    return {
        operation.outputs[0].name: package.array(operation.attributes["val"])
        for operation in operations(package.model.program.functions["main"].block)
        if operation.type == "const" and _is_weight(operation)
    }


def _is_weight(operation: Operation) -> bool:
    kind: Any = operation.outputs[0].type
    return kind.dtype.value in ("fp16", "fp32") and len(kind.shape) >= 2


@pytest.mark.parametrize(
    ("target", "options"),
    [("iOS16", PalettizeOptions(bits)) for bits in (1, 2, 4, 6, 8)]
    + [("iOS18", PalettizeOptions(bits)) for bits in (1, 2, 3, 4, 6, 8)]
    + [("iOS18", PalettizeOptions(4, granularity=PER_GROUPED_CHANNEL, group_size=8))],
    ids=lambda value: value if isinstance(value, str) else f"{value.bits}-{value.granularity}",
)
def test_both_readers_decompress_to_the_same_weights(
    tiny_package: Package, tmp_path: Path, target: str, options: PalettizeOptions
) -> None:
    source, output = tiny_package(target), tmp_path / "out.mlpackage"
    report = palettize_package(source, output, options)
    theirs, original = dense_weights(output), float_weights(source)
    assert {weight.name for weight in report.weights} == set(theirs)
    assert len(theirs) == len(WEIGHTS)
    for weight in report.weights:
        noise = np.sum((theirs[weight.name].astype(np.float64) - original[weight.name]) ** 2)
        assert noise == pytest.approx(weight.squared_error, rel=1e-3)
        assert weight.snr_db > 5.5 * options.bits - 2.5
    kinds = {op.type for op in operations(open_package(output).model.program.functions["main"].block)}
    assert "constexpr_lut_to_dense" in kinds
    model = TorchBackend().load(output)
    arrays = seeded_inputs(model.inputs, 1)[0]
    expected = _with_weights(source, theirs)(**arrays)
    for name, value in model(**arrays).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)


def _with_weights(path: Path, weights: dict[str, np.ndarray]) -> Any:
    """The float package, run with ``weights`` in place of its own."""
    import torch

    model = TorchBackend(fuse=False).load(path)
    for node in model.module.graph.nodes:
        if node.op == "get_attr" and node.meta.get("mil") in weights:
            getattr(model.module, str(node.target)).copy_(torch.from_numpy(weights[node.meta["mil"]].copy()))
    return model


@pytest.mark.parametrize(("target", "granularity"), [("iOS16", "per_tensor"), ("iOS18", "per_grouped_channel")])
def test_written_as_coremltools_writes_it(
    tiny_package: Package, tmp_path: Path, target: str, granularity: str
) -> None:
    """The same operations with the same types, but for names and offsets."""
    ct = import_coremltools()
    optimize = import_coremltools("optimize").coreml
    source = tiny_package(target)
    config = optimize.OptimizationConfig(
        optimize.OpPalettizerConfig(
            mode="uniform", nbits=4, granularity=granularity, group_size=8, weight_threshold=2047
        )
    )
    model = ct.models.MLModel(str(source), skip_model_load=True)
    optimize.palettize_weights(model, config).save(str(tmp_path / "theirs.mlpackage"))
    options = PalettizeOptions(
        4, granularity=granularity.replace("_", "-"), group_size=8, embeddings=target == "iOS16"
    )
    palettize_package(source, tmp_path / "ours.mlpackage", options)

    def shapes(path: Path) -> list[Any]:
        return [
            (op.outputs[0].type, [(key, value.type) for key, value in sorted(_literals(op).items())])
            for op in operations(open_package(path).model.program.functions["main"].block)
            if op.type == "constexpr_lut_to_dense"
        ]

    assert shapes(tmp_path / "ours.mlpackage") == shapes(tmp_path / "theirs.mlpackage")


def _literals(operation: Operation) -> dict[str, Any]:
    inputs = {name: bindings[0] for name, bindings in operation.inputs.items()}
    return inputs | {name: value for name, value in operation.attributes.items() if name != "name"}


def test_every_error_is_at_most_coremltools(tiny_package: Package, tmp_path: Path) -> None:
    """coremltools' k-means on the same package needs scikit-learn for weights as small as these: its exact
    clustering is forced instead, which is better than what it would do."""
    quantization = import_coremltools("models.neural_network.quantization_utils")
    source = tiny_package("iOS16")
    report = palettize_package(source, tmp_path / "out.mlpackage", PalettizeOptions(4))
    original = float_weights(source)
    for weight in report.weights:
        values = original[weight.name]
        lut, indices = quantization._get_kmeans_lookup_table_and_weight(4, values, force_kmeans1d=True)
        theirs = lut.astype(np.float16)[indices].astype(np.float64).reshape(values.shape)
        assert weight.squared_error <= np.sum((values.astype(np.float64) - theirs) ** 2) * (1 + 1e-5)


def test_float32_weights_stay_float32(tiny_package: Package, tmp_path: Path) -> None:
    report = palettize_package(tiny_package("iOS16", "FLOAT32"), tmp_path / "out.mlpackage", PalettizeOptions(6))
    assert {array.dtype for array in dense_weights(tmp_path / "out.mlpackage").values()} == {np.dtype(np.float32)}
    assert report.worst(1)[0].snr_db > 28


def test_embeddings_only_on_request(tiny_package: Package, tmp_path: Path) -> None:
    without = palettize_package(tiny_package("iOS16"), tmp_path / "a.mlpackage", PalettizeOptions(6))
    with_tables = palettize_package(
        tiny_package("iOS16"), tmp_path / "b.mlpackage", PalettizeOptions(6, embeddings=True)
    )
    added = {weight.name for weight in with_tables.weights} - {weight.name for weight in without.weights}
    assert [weight.shape for weight in with_tables.weights if weight.name in added] == [(70, 32)]


def test_what_is_not_palettized_is_copied_bit_for_bit(tiny_package: Package, tmp_path: Path) -> None:
    source, output = tiny_package("iOS16"), tmp_path / "out.mlpackage"
    report = palettize_package(source, output, PalettizeOptions(4))
    changed = {weight.name for weight in report.weights}
    before, after = float_weights(source), float_weights(output)
    assert set(before) - set(after) == changed
    assert all(before[name].tobytes() == after[name].tobytes() for name in after)


def test_the_same_input_gives_the_same_bytes_whatever_the_cores(
    tiny_package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cores in (("a", 1), ("b", 5)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        palettize_package(tiny_package("iOS18"), tmp_path / f"{name}.mlpackage", PalettizeOptions(3))
    one, two = (
        [path.read_bytes() for path in sorted((tmp_path / f"{name}.mlpackage").rglob("*")) if path.is_file()]
        for name in ("a", "b")
    )
    assert one == two


def test_sizes_are_what_the_bits_say(tiny_unet: Path, tmp_path: Path) -> None:
    weights = tiny_unet / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    report = palettize_package(tiny_unet, tmp_path / "out.mlpackage", PalettizeOptions(4))
    elements = sum(weight.size for weight in report.weights)
    tables = len(report.weights) * (16 * 2 + 192)
    saved = report.bytes_before - report.bytes_after
    assert abs(saved - elements * 12 / 8) <= tables + 64 * 1024
    assert elements * 2 > 0.8 * weights.stat().st_size
    assert report.average_bits == 4
    assert report.palettization.bits_by_weight == {weight.name: 4 for weight in report.weights}


def test_the_weight_is_stored_once_however_often_it_is_used(tiny_package: Package, tmp_path: Path) -> None:
    """Two functions that share their weights: the file does not grow."""
    source = tiny_package("iOS18")
    package = open_package(source)
    program = package.model.program
    both = replace(program, functions={**program.functions, "again": program.functions["main"]})
    weights = tmp_path / "weight.bin"
    shutil.copy(source / "Data" / "com.apple.CoreML" / "weights" / "weight.bin", weights)
    write_package(replace(package.model, program=both), tmp_path / "both.mlpackage", weights)
    single = palettize_package(source, tmp_path / "one.mlpackage", PalettizeOptions(4))
    double = palettize_package(tmp_path / "both.mlpackage", tmp_path / "two.mlpackage", PalettizeOptions(4))
    one, two = (tmp_path / f"{name}.mlpackage/Data/com.apple.CoreML/weights/weight.bin" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert len(single.weights) == len(double.weights)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("iOS16", PalettizeOptions(3), "3 bits needs a package for iOS 18"),
        (
            "iOS16",
            PalettizeOptions(4, granularity=PER_GROUPED_CHANNEL),
            "per-grouped-channel needs a package for iOS 18",
        ),
        ("iOS15", PalettizeOptions(6), "need a package for iOS 16"),
        ("iOS16", PalettizeOptions(bits_by_weight={"nowhere": 4}), "names 1 weights that are not there.*nowhere"),
    ],
)
def test_plans_that_cannot_be_carried_out(
    tiny_package: Package, tmp_path: Path, target: str, options: PalettizeOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        palettize_package(tiny_package(target), tmp_path / "out.mlpackage", options)
    assert list(tmp_path.iterdir()) == []


def test_a_palettized_input_is_refused(tiny_package: Package, tmp_path: Path) -> None:
    palettize_package(tiny_package("iOS16"), tmp_path / "once.mlpackage", PalettizeOptions(6))
    with pytest.raises(InputError, match=r"compressed already.*give the float16 package"):
        palettize_package(tmp_path / "once.mlpackage", tmp_path / "twice.mlpackage", PalettizeOptions(4))


def test_a_program_without_weights_is_refused(tiny_package: Package, tmp_path: Path) -> None:
    package = open_package(tiny_package("iOS16"))
    function = package.model.program.functions["main"]
    kept = [op for op in function.block.operations if op.type == "const" and not _is_weight(op)]
    outputs = function.block.outputs
    for variable in (made for op in function.block.operations for made in op.outputs if made.name in outputs):
        assert isinstance(variable.type, TensorType)
        shape = Value(TensorType(DType.INT32, (len(variable.type.shape),)), np.array(variable.type.shape, "<i4"))
        zero = Value(TensorType(variable.type.dtype), np.zeros((), np.float32))
        kept.append(Operation("fill", {"shape": (shape,), "value": (zero,)}, (variable,)))
    empty = replace(function, blocks={function.opset: Block(tuple(kept), outputs)})
    model = replace(package.model, program=replace(package.model.program, functions={"main": empty}))
    weights = tmp_path / "weight.bin"
    shutil.copy(package.root / "weights" / "weight.bin", weights)
    write_package(model, tmp_path / "empty.mlpackage", weights)
    with pytest.raises(InputError, match="no weights to palettize"):
        palettize_package(tmp_path / "empty.mlpackage", tmp_path / "out.mlpackage", PalettizeOptions(6))


def test_a_neural_network_is_refused(tmp_path: Path) -> None:
    ct = import_coremltools()
    builder = import_coremltools("models.neural_network").NeuralNetworkBuilder(
        [("x", import_coremltools("models.datatypes").Array(3))],
        [("y", import_coremltools("models.datatypes").Array(3))],
    )
    builder.add_activation("act", "RELU", "x", "y")
    ct.models.MLModel(builder.spec, skip_model_load=True).save(str(tmp_path / "old.mlmodel"))
    with pytest.raises(UnsupportedError, match="expected an ML Program"):
        palettize_package(tmp_path / "old.mlmodel", tmp_path / "out.mlpackage", PalettizeOptions(6))


@pytest.mark.parametrize("damage", ["truncated", "missing", "overwritten"])
def test_a_damaged_weight_file_is_refused(tiny_package: Package, tmp_path: Path, damage: str) -> None:
    source = tmp_path / "damaged.mlpackage"
    shutil.copytree(tiny_package("iOS16"), source)
    weights = source / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    else:
        weights.write_bytes(weights.read_bytes()[:64] + bytes(weights.stat().st_size - 64))
    with pytest.raises(PackageError, match=r"weight\.bin"):
        palettize_package(source, tmp_path / "out.mlpackage", PalettizeOptions(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.mlpackage"]


def test_names_are_checked_first(tiny_package: Package, tmp_path: Path) -> None:
    source = tiny_package("iOS16")
    for output, message in ((source, "the output is the input"), (tmp_path / "out", "must end in .mlpackage")):
        with pytest.raises(InputError, match=message):
            palettize_package(source, output, PalettizeOptions(6))
    with pytest.raises(InputError, match="5 bits"):
        PalettizeOptions(5)


def test_outputs_are_compared_before_anything_is_published(tiny_package: Package, tmp_path: Path) -> None:
    output = tmp_path / "out.mlpackage"
    checked = palettize_checked(tiny_package("iOS16"), output, PalettizeOptions(8))
    assert min(checked.psnr_db.values()) > 34
    before = (output / "Manifest.json").read_bytes()
    with pytest.raises(VerificationError, match=r"at 1 bits .* expected at least 200.0 dB: nothing is written"):
        palettize_checked(tiny_package("iOS16"), output, PalettizeOptions(1), bounds={1: 200.0})
    assert (output / "Manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.mlpackage"]


def test_a_file_that_decompresses_to_something_else_is_not_published(
    tiny_package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(palette, "pack", lambda indices, bits: np.zeros(packed_size(indices.size, bits), np.uint8))
    with pytest.raises(DiffusionError, match="decompresses with a squared error"):
        palettize_package(tiny_package("iOS16"), tmp_path / "out.mlpackage", PalettizeOptions(4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_memory_is_limited_to_little_more_than_one_map_of_the_weights(
    tiny_package: Package, tmp_path: Path
) -> None:
    """Each weight is mapped anew, by several threads; such maps must not count as memory of the process's own."""
    source = tmp_path / "large.mlpackage"
    shutil.copytree(tiny_package("iOS16"), source)
    (weights,) = source.rglob("weight.bin")
    os.truncate(weights, 4 * 2**30)  # a hole: it takes no disk
    program = (
        "import resource, sys; from pathlib import Path;"
        "from diffusion_convert.palettize.palettize_options import PalettizeOptions;"
        "from diffusion_convert.palettize.palettize_package import palettize_package;"
        "resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30, 6 * 2**30));"
        "palettize_package(Path(sys.argv[1]), Path(sys.argv[2]), PalettizeOptions(6))"
    )
    output = tmp_path / "out.mlpackage"
    done = subprocess.run(
        [sys.executable, "-c", program, source, output], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert output.is_dir()
