"""Packages: read into frozen values, written back without loss, and refused where they are no package."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import DiffusionError, InputError, PackageError, UnsupportedError
from diffusion_runtime.mil import proto, wire
from diffusion_runtime.mil.description import serialize
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import open_package, resolve, specification_path, write_package
from diffusion_runtime.mil.program import (
    Blob,
    Block,
    DictType,
    DType,
    Feature,
    Function,
    FunctionInterface,
    ListType,
    Metadata,
    Operation,
    Program,
    StateType,
    TensorType,
    TupleType,
    Value,
    Variable,
    numpy_dtype,
    operations,
)
from shared_data import PAIRS, needs_pairs

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
RANDOM = np.random.default_rng(0)


def literal(dtype: DType, shape: tuple[int, ...]) -> Value:
    array = RANDOM.integers(0, 2, shape).astype(numpy_dtype(dtype))
    return Value(TensorType(dtype, shape), array)


def text(value: str) -> Value:
    return Value(TensorType(DType.STRING), value)


def every_kind_of_value() -> list[Value]:
    numbers = [dtype for dtype in DType if dtype is not DType.STRING]
    pair = Value(
        TupleType((TensorType(DType.STRING), TensorType(DType.INT32))), (text("é"), literal(DType.INT32, ()))
    )
    table = DictType(TensorType(DType.STRING), TensorType(DType.STRING))
    return [
        *(literal(dtype, shape) for dtype in numbers for shape in ((), (3,), (2, 5), (0, 2))),
        Value(TensorType(DType.FLOAT32, (3,)), np.array([np.nan, -0.0, np.inf], np.float32)),
        Value(TensorType(DType.UINT64), np.array(2**64 - 1, np.uint64)),
        Value(TensorType(DType.INT16, (2,)), np.array([-(2**15), 2**15 - 1], np.int16)),
        Value(TensorType(DType.STRING, (2,)), np.array(["a", ""], object)),
        Value(TensorType(DType.FLOAT16, (2, 3)), Blob("@model_path/weights/weight.bin", 64)),
        Value(ListType(TensorType(DType.STRING), 2), (text("a"), text("b"))),
        Value(ListType(TensorType(DType.INT64)), ()),
        Value(table, ((text("k"), text("v")), (text("a"), text("")))),
        pair,
    ]


X = Feature("x", "multiArray", "Float32", (1, 4), shape_range=((1, 1), (1, -1)), description="in")
Y = Feature("y", "multiArray", "Int32", (2,), enumerated_shapes=((2,), (3,)), optional=True)
INTERFACE = FunctionInterface("main", (X,), (Y,), (Feature("state", "state", "Float16", (2, 2)),))
ABOUT = Metadata("d", "1", "a", "l", {"zebra": "1", "ape": "2", "": "3"})


def model_of(values: list[Value]) -> Model:
    """A model whose program holds ``values`` in attributes, inputs and nested blocks."""
    consts = tuple(
        Operation("const", {}, (Variable(f"v{index}", value.type),), {"name": text(f"v{index}"), "val": value})
        for index, value in enumerate(values)
    )
    state = Variable("state", StateType(TensorType(DType.FLOAT16, (2, None))))
    nested = Block(consts[:2], ("v0",), inputs=(state,), attributes={"a": text("b")})
    many = Operation("made_up", {"values": ("x", values[0], "v1")}, (), blocks=(nested, nested))
    block = Block((*consts, many), ("v0",))
    x = Variable("x", TensorType(DType.FLOAT32, (1, None)))
    function = Function((x,), "CoreML7", {"CoreML7": block, "CoreML6": Block((), ())}, {"f": text("g")})
    program = Program({"main": function}, attributes={"buildInfo": text("x")}, doc_string="doc")
    return Model(8, program, serialize((INTERFACE,), ABOUT), is_updatable=True)


def test_every_kind_of_value_survives_writing_and_reading() -> None:
    model = model_of(every_kind_of_value())
    read = proto.model_from_bytes(proto.model_to_bytes(model))
    assert read == model
    assert (read.interfaces, read.metadata, read.default_function) == ((INTERFACE,), ABOUT, "")
    assert list(read.metadata.user_defined) == ["zebra", "ape", ""]
    assert proto.model_to_bytes(read) == proto.model_to_bytes(model)


def test_several_functions_are_kept() -> None:
    base = model_of(every_kind_of_value()[:2])
    functions = dict.fromkeys(("encode", "decode"), base.program.functions["main"])
    interfaces = tuple(dataclasses.replace(base.interface, name=name) for name in functions)
    model = Model(8, Program(functions), serialize(interfaces, ABOUT, "decode"))
    read = proto.model_from_bytes(proto.model_to_bytes(model))
    assert read == model
    assert read.interfaces == interfaces
    assert read.interface.name == "decode"


def same_message(left: bytes, right: bytes) -> bool:
    message = import_coremltools("proto.Model_pb2").Model
    return bool(message.FromString(left) == message.FromString(right))


def test_what_coremltools_wrote_is_written_back_without_loss(network: Path) -> None:
    source = (network / MODEL).read_bytes()
    model = proto.read_model(network / MODEL)
    assert same_message(proto.model_to_bytes(model), source)
    assert wire.payload(proto.model_to_bytes(model), 2) == wire.payload(source, 2)


@needs_pairs
@pytest.mark.parametrize("pair", PAIRS, ids=lambda path: path.name)
def test_samples_are_written_back_without_loss(pair: Path) -> None:
    (path,) = pair.glob("*.mlpackage")
    package = open_package(path)
    source = (path / MODEL).read_bytes()
    assert same_message(proto.model_to_bytes(package.model), source)
    assert wire.payload(proto.model_to_bytes(package.model), 2) == wire.payload(source, 2)
    blobs = [
        value
        for operation in operations(package.model.program.functions["main"].block)
        for value in operation.attributes.values()
        if isinstance(value.data, Blob)
    ]
    assert blobs
    for value in blobs:
        array = package.array(value)
        assert isinstance(value.type, TensorType)
        assert array.shape == value.type.shape
        assert array.dtype == numpy_dtype(value.type.dtype)


def test_a_description_is_changed_in_one_place(network: Path) -> None:
    model = proto.read_model(network / MODEL)
    changed = dataclasses.replace(model, description=serialize(model.interfaces, Metadata("another")))
    assert changed.metadata.description == "another"
    assert proto.model_from_bytes(proto.model_to_bytes(changed)) == changed
    with pytest.raises(PackageError, match="description is damaged"):
        dataclasses.replace(model, description=b"\xff")


def test_writing_a_package_moves_the_weights_in_and_replaces_whole(network: Path, tmp_path: Path) -> None:
    package = open_package(network)
    target = tmp_path / "copy.mlpackage"
    for _ in range(2):
        weights = Path(shutil.copy(package.root / "weights" / "weight.bin", tmp_path))
        write_package(package.model, target, weights)
        assert open_package(target).model == package.model
        assert (target / "Data/com.apple.CoreML/weights/weight.bin").is_file()
        assert [path.name for path in tmp_path.iterdir()] == ["copy.mlpackage"]


def test_an_interrupted_write_leaves_what_was_there(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = shutil.copytree(network, tmp_path / "copy.mlpackage")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(proto, "write_model", full)
    model = open_package(target).model
    with pytest.raises(OSError, match="no space"):
        write_package(model, target)
    assert open_package(target).model == model
    assert [path.name for path in tmp_path.iterdir()] == ["copy.mlpackage"]


def neural_network(path: Path) -> None:
    spec = import_coremltools("proto.Model_pb2").Model(specificationVersion=4)
    spec.neuralNetwork.SetInParent()
    (path / MODEL).write_bytes(spec.SerializeToString())


def pipeline(path: Path) -> None:
    spec = import_coremltools("proto.Model_pb2").Model(specificationVersion=4)
    spec.pipeline.SetInParent()
    (path / MODEL).write_bytes(spec.SerializeToString())


def truncate(path: Path) -> None:
    (path / MODEL).write_bytes((path / MODEL).read_bytes()[:-40])


def empty(path: Path) -> None:
    (path / MODEL).write_bytes(b"")


def manifest(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = json.loads((path / "Manifest.json").read_text())
        data |= changes
        (path / "Manifest.json").write_text(json.dumps(data))

    return change


def item(path: str) -> dict[str, Any]:
    return {"itemInfoEntries": {"A": {"path": path}}, "rootModelIdentifier": "A"}


REFUSED: dict[str, tuple[Callable[[Path], object], type[DiffusionError], str]] = {
    "neural network": (neural_network, UnsupportedError, "of kind neuralNetwork, expected an ML Program"),
    "pipeline": (pipeline, UnsupportedError, "of kind pipeline, expected an ML Program"),
    "truncated": (truncate, PackageError, "not a Core ML model, or truncated"),
    "empty": (empty, PackageError, "it holds no model"),
    "no model": (lambda path: (path / MODEL).unlink(), PackageError, "model.mlmodel is missing"),
    "outside": (manifest(**item("../../../secret")), PackageError, "leads outside"),
    "absolute": (manifest(**item("/etc/passwd")), PackageError, "leads outside"),
    "no root": (manifest(rootModelIdentifier="B"), PackageError, "not a package's manifest"),
    "no path": (manifest(itemInfoEntries={"A": {}}, rootModelIdentifier="A"), PackageError, "is missing"),
    "of the future": (manifest(fileFormatVersion="2.0.0"), PackageError, "package format '2.0.0'"),
    "no JSON": (lambda path: (path / "Manifest.json").write_text("{"), PackageError, "cannot be read as JSON"),
    "no manifest": (lambda path: (path / "Manifest.json").unlink(), PackageError, "holds neither Manifest.json"),
    "missing": (shutil.rmtree, InputError, "no such model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_package_is_refused_in_one_line(kind: str, network: Path, tmp_path: Path) -> None:
    path = shutil.copytree(network, tmp_path / "broken.mlpackage")
    damage, error, message = REFUSED[kind]
    damage(path)
    with pytest.raises(error, match=message) as caught:
        open_package(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_that_leads_to_itself_is_refused(network: Path, tmp_path: Path) -> None:
    path = shutil.copytree(network, tmp_path / "model.mlpackage")
    (path / MODEL).unlink()
    (path / MODEL).symlink_to("model.mlmodel")
    with pytest.raises(PackageError, match="missing"):
        open_package(path)


def test_a_link_that_leads_outside_is_refused(network: Path, tmp_path: Path) -> None:
    path = shutil.copytree(network, tmp_path / "linked.mlpackage")
    outside = tmp_path / "outside.mlmodel"
    shutil.move(path / MODEL, outside)
    (path / MODEL).symlink_to(outside)
    with pytest.raises(PackageError, match="leads outside"):
        specification_path(path)


@pytest.mark.parametrize("path", ["../weight.bin", "@model_path/../../x", "/x", "@model_path", "@model_path/a\\b"])
def test_weights_outside_of_the_model_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not inside the model"):
        resolve(tmp_path, path, tmp_path)


LITERALS: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"floats": {"values": [1.0]}}, "1 elements, expected 2"),
    "strings for numbers": ({"strings": {"values": ["a", "b"]}}, "strings where numbers are expected"),
    "half an element": ({"bytes": {"values": b"abc"}}, "buffer size must be a multiple"),
    "nothing": ({}, "without a value"),
}


@pytest.mark.parametrize("kind", LITERALS)
def test_damaged_literals_are_refused(kind: str) -> None:
    fields, message = LITERALS[kind]
    mil = import_coremltools("proto.MIL_pb2")
    spec = proto.program_to_proto(model_of([literal(DType.FLOAT32, (2,)), literal(DType.INT8, ())]).program)
    value = spec.functions["main"].block_specializations["CoreML7"].operations[0].attributes["val"]
    value.immediateValue.tensor.CopyFrom(mil.TensorValue(**fields))
    with pytest.raises(PackageError, match=message) as caught:
        proto.program_from_proto(spec)
    assert "operation const v0" in str(caught.value)


def test_integers_out_of_range_are_refused() -> None:
    spec = proto.program_to_proto(model_of([literal(DType.INT16, ()), literal(DType.INT8, ())]).program)
    operation = spec.functions["main"].block_specializations["CoreML7"].operations[0]
    operation.attributes["val"].immediateValue.tensor.ints.values[:] = [40_000]
    with pytest.raises(PackageError, match="out of range"):
        proto.program_from_proto(spec)


def test_reading_a_package_does_not_wait_for_coremltools(network: Path) -> None:
    code = """
import sys
from pathlib import Path
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.coremltools_import import import_coremltools, import_messages
open_package(Path(sys.argv[1]))
assert "coremltools" not in sys.modules
assert import_messages("Model_pb2").Model is import_coremltools("proto.Model_pb2").Model
assert import_messages("Model_pb2") is sys.modules["coremltools.proto.Model_pb2"]
"""
    done = subprocess.run([sys.executable, "-c", code, str(network)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("data", [b"\x08", b"\x12\x05ab", b"\x0b", b"\xff" * 11])
def test_wire_refuses_what_is_no_message(data: bytes) -> None:
    with pytest.raises(ValueError, match="byte"):
        list(wire.fields(data))
