"""What `inspect` says of packages, compiled models, bundles and zips."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_bundle
from diffusion_convert.bundle.folder import BundleOptions, bundle_folder
from diffusion_convert.inspect import attention_kind, inspect
from diffusion_convert.inspect.obstacles import obstacles
from diffusion_convert.inspect.show import as_json, as_text
from diffusion_convert.inspect.work import floating_point_work
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.mil.program import Block, DType, Function, Operation, TensorType, Value, Variable
from shared_data import PAIRS, needs_pairs


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_bundle.write_bundle(tmp_path_factory.mktemp("inspect") / "out")
    bundle_folder(folder, BundleOptions(zips=True, card=False))
    return folder


def half(*shape: int | None) -> TensorType:
    return TensorType(DType.FLOAT16, shape)


def function(*operations: Operation, **inputs: TensorType) -> Function:
    variables = tuple(Variable(name, kind) for name, kind in inputs.items())
    return Function(variables, "CoreML6", {"CoreML6": Block(operations, ())})


def op(kind: str, result: TensorType, **inputs: str | Value | tuple[str, ...]) -> Operation:
    bindings = {name: value if isinstance(value, tuple) else (value,) for name, value in inputs.items()}
    return Operation(kind, bindings, (Variable(f"{kind}_result", result),))


def text(value: str) -> Value:
    return Value(TensorType(DType.STRING), value)


TRUE = Value(TensorType(DType.BOOL), np.array(True))


@pytest.mark.parametrize(
    ("operation", "inputs", "expected"),
    [
        # Each output of a convolution sums over input channels of its group times the kernel.
        (
            op("conv", half(1, 8, 4, 4), x="x", weight="w"),
            {"x": half(1, 6, 4, 4), "w": half(8, 3, 3, 3)},
            8 * 16 * 27,
        ),
        (
            op("conv_transpose", half(1, 8, 8, 8), x="x", weight="w"),
            {"x": half(1, 6, 4, 4), "w": half(6, 8, 2, 2)},
            96 * 32,
        ),
        (op("linear", half(2, 5), x="x", weight="w"), {"x": half(2, 7), "w": half(5, 7)}, 2 * 5 * 7),
        (op("matmul", half(3, 2, 5), x="x", y="y"), {"x": half(3, 2, 7), "y": half(3, 7, 5)}, 3 * 2 * 5 * 7),
        (op("matmul", half(2, 5), x="x", y="y", transpose_x=TRUE), {"x": half(7, 2), "y": half(7, 5)}, 2 * 5 * 7),
        (
            op("einsum", half(2, 77, 1, 64), equation=text("bkhc,bchq->bkhq"), values=("k", "q")),
            {"k": half(2, 77, 1, 40), "q": half(2, 40, 1, 64)},
            2 * 77 * 40 * 64,
        ),
        (
            op("scaled_dot_product_attention", half(8, 64, 40), query="q", key="k", value="v"),
            {"q": half(8, 64, 40), "k": half(8, 77, 40), "v": half(8, 77, 40)},
            8 * 64 * 77 * 80,
        ),
    ],
)
def test_work_counts_multiplications_and_additions(
    operation: Operation, inputs: dict[str, TensorType], expected: int
) -> None:
    work = floating_point_work(function(operation, **inputs))
    assert work.by_operation == {operation.type: 2 * expected}
    assert (work.total, work.unknown) == (2 * expected, 0)


def test_work_of_unknown_shapes_is_counted_as_unknown() -> None:
    unknown = op("linear", half(None, 5), x="x", weight="w")
    work = floating_point_work(function(unknown, x=half(None, 7), w=half(5, 7)))
    assert (work.total, work.unknown) == (0, 1)


def einsum(keys: int, queries: int) -> Operation:
    return op("einsum", half(2, keys, 1, queries), equation=text("bkhc,bchq->bkhq"), values=("k", "q"))


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ((einsum(4096, 4096), einsum(77, 4096)), "split_einsum"),
        ((einsum(4096, 512), einsum(77, 4096)), "split_einsum_v2"),
        ((einsum(77, 64),), "split_einsum"),
        ((op("softmax", half(8, 64, 64)), op("softmax", half(8, 64, 77))), "original"),
        ((op("softmax", half(1, 64, 64)),), None),
        ((op("conv", half(1, 2, 3, 4)),), None),
    ],
)
def test_attention_is_told_from_the_operations(operations: tuple[Operation, ...], expected: str | None) -> None:
    assert attention_kind(function(*operations)) == expected


def reasons(*operations: Operation, weight_bytes: int = 0) -> str:
    model, _ = small_bundle.small_model("unet", einsum=False)
    program = replace(model.program, functions={"main": function(*operations)})
    return "; ".join(item.reason for item in obstacles(replace(model, program=program), weight_bytes))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (op("relu", TensorType(DType.FLOAT32, (1, 4))), "computed in float32"),
        (op("add", TensorType(DType.INT32, (4,))), "integer arithmetic"),
        (op("relu", half(1, 1, 1, 1, 1, 1)), "more than 5 dimensions"),
        (op("relu", half(1, 20_000)), "a dimension of more than 16384"),
        (op("gather", half(1, 77, 768)), "look-ups"),
        (replace(op("cond", half(1)), blocks=(Block((), ()),)), "control flow"),
    ],
)
def test_obstacles_to_the_neural_engine_have_reasons(operation: Operation, expected: str) -> None:
    assert expected in reasons(operation)


def test_nothing_stands_in_the_way_of_half_precision_convolutions() -> None:
    assert reasons(op("conv", half(2, 320, 64, 64)), op("cast", TensorType(DType.FLOAT32, (2, 4)))) == ""
    assert "2.00 GB of weights" in reasons(weight_bytes=2_000_000_000)


def test_ranges_of_shapes_stand_in_the_way_and_enumerated_shapes_do_not() -> None:
    model, _ = small_bundle.small_model("unet", einsum=False)
    first, *others = model.interface.inputs

    def told(**shapes: Any) -> str:
        interface = replace(model.interface, inputs=(replace(first, **shapes), *others))
        changed = replace(model)
        object.__setattr__(changed, "interfaces", (interface,))  # parsed from the description, which has fixed ones
        return "; ".join(item.reason for item in obstacles(changed, 0))

    plain = told()
    assert told(enumerated_shapes=((1, 2), (2, 2))) == plain
    assert f"ranges of shapes ({first.name})" not in plain
    assert f"ranges of shapes ({first.name})" in told(shape_range=((1, 2), (2, 2)))


def test_package_and_compiled_model_are_described_alike(bundle: Path) -> None:
    package = bundle / "split_einsum_v2" / "packages" / f"{small_bundle.NAME}_unet.mlpackage"
    compiled = bundle / "split_einsum_v2" / "compiled" / "Unet.mlmodelc"
    ((first,), (second,)) = (inspect(path)[0].models for path in (package, compiled))
    same = (
        "inputs",
        "outputs",
        "operations",
        "precision",
        "storage",
        "bits",
        "attention",
        "work",
        "obstacles",
        "metadata",
    )
    assert {name: getattr(first, name) for name in same} == {name: getattr(second, name) for name in same}
    assert first.attention == "split_einsum"
    assert first.weight_bytes == 128 + 2 * small_bundle.CHANNELS == second.weight_bytes
    sample = first.inputs[0]
    assert (sample.name, sample.dtype, sample.shape) == ("sample", "Float16", (2, 4, 8, 8))


def test_bundle_is_described_with_its_manifests(bundle: Path) -> None:
    reports = inspect(bundle)
    assert [report.name for report in reports] == [
        f"out/{attention}/{kind}"
        for attention in ("original", "split_einsum_v2")
        for kind in ("compiled", "packages")
    ]
    assert all(report.manifest is not None and len(report.models) == 4 for report in reports)
    shown = as_text(reports)
    assert "maker/tiny-diffusion-v1-4 (sd1), original, 64x64, batch 2, epsilon prediction, apple layout" in shown
    assert "noise_pred Float32 2x4x8x8" in shown


def test_zip_is_described_like_its_folder_without_unpacking_weights(bundle: Path) -> None:
    (zipped,) = inspect(next(bundle.glob("*_original_compiled.zip")))
    (folder,) = inspect(bundle / "original" / "compiled")
    assert zipped.models == folder.models
    assert zipped.manifest == folder.manifest


def test_json_holds_what_programs_need(bundle: Path) -> None:
    (found,) = json.loads(as_json(inspect(bundle / "original" / "compiled")))
    unet = next(model for model in found["models"] if model["name"] == "Unet.mlmodelc")
    assert unet["work"]["total"] == unet["work"]["by_operation"]["matmul"] == 2 * small_bundle.CHANNELS
    assert unet["operations"]["matmul"] == 1
    assert unet["inputs"][0]["shape"] == [2, 4, 8, 8]
    assert found["manifest"]["attention"] == "original"


def test_operations_are_counted_as_apps_look_them_up(bundle: Path) -> None:
    compiled = bundle / "split_einsum_v2" / "compiled" / "Unet.mlmodelc"
    (entry,) = json.loads((compiled / "metadata.json").read_text())
    for path in (compiled, bundle / "split_einsum_v2" / "packages" / f"{small_bundle.NAME}_unet.mlpackage"):
        (report,) = inspect(path)[0].models
        assert report.histogram == entry["mlProgramOperationTypeHistogram"]
        assert (report.precision, report.storage) == (entry["computePrecision"], entry["storagePrecision"])
        assert report.inferred == ()


@needs_pairs
@pytest.mark.parametrize("folder", PAIRS, ids=lambda path: path.name)
def test_apples_compiled_models_are_described_as_apple_does(folder: Path) -> None:
    name = folder.name
    (entry,) = json.loads((folder / f"{name}.mlmodelc" / "metadata.json").read_text())
    reports = [inspect(folder / f"{name}{suffix}")[0].models[0] for suffix in (".mlmodelc", ".mlpackage")]
    for report in reports:
        assert report.histogram == entry["mlProgramOperationTypeHistogram"]
        assert (report.precision, report.storage) == (entry["computePrecision"], entry.get("storagePrecision", ""))
        assert [port.name for port in report.inputs] == [schema["name"] for schema in entry["inputSchema"]]
    assert reports[0].work == reports[1].work


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_weights_are_seen(bundle: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(bundle / "original" / "compiled" / "Unet.mlmodelc", tmp_path / "Unet.mlmodelc")
    weights = tmp_path / "Unet.mlmodelc" / "weights" / "weight.bin"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "short":
        weights.write_bytes(data[:100])
    with pytest.raises(PackageError, match=r"weight\.bin"):
        inspect(tmp_path / "Unet.mlmodelc")


def test_what_cannot_be_inspected_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        inspect(tmp_path / "nothing")
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(InputError, match=r"README\.md: is a file; expected \.mlpackage"):
        inspect(tmp_path / "README.md")
    with pytest.raises(InputError, match="holds no models"):
        inspect(tmp_path)
    for name, said in (("notes.txt", "holds no models"), ("A.mlmodelc/model.mil", "A.mlmodelc/")):
        with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:
            archive.writestr(f"damaged/{name}", "program(1.0) {")
        with pytest.raises((InputError, PackageError), match=said) as caught:
            inspect(tmp_path / "damaged.zip")
        assert str(caught.value).startswith(f"{tmp_path / 'damaged.zip'}"), "not where it was unpacked to"
    (tmp_path / "page.zip").write_text("<html>")
    with pytest.raises(PackageError, match="no zip but a page"):
        inspect(tmp_path / "page.zip")
    (tmp_path / "empty.mlmodelc").mkdir()
    with pytest.raises(PackageError, match="holds neither"):
        inspect(tmp_path / "empty.mlmodelc")
