"""The compiled form against Apple's: three models rebuilt from bytes (always), real pairs (where present)."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from compiled_pairs import compiler_versions, differences
from diffusion_convert.compile import compile_package
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.text import read_compiled
from diffusion_runtime.mil.text_parse import parse_text
from diffusion_runtime.mil.text_print import Dialect, program_text
from diffusion_runtime.mil.wire import message_field, varint_field
from shared_data import PAIRS, needs_pairs

STRING, FLOAT16, FLOAT32, INT8, INT32 = 2, 10, 11, 21, 23
FLOAT32_ARRAY = varint_field(2, 65568)
BLOB = message_field(1, b"@model_path/weights/weights.bin") + varint_field(2, 64)


def tensor(dtype: int, shape: Iterable[int | None]) -> bytes:
    dimensions = [message_field(2, b"") if n is None else message_field(1, varint_field(1, n)) for n in shape]
    rank = varint_field(2, len(dimensions))
    return message_field(1, varint_field(1, dtype) + rank + b"".join(message_field(3, item) for item in dimensions))


def named(name: str, kind: bytes) -> bytes:
    return message_field(1, name.encode()) + message_field(2, kind)


def literal(kind: bytes, data: bytes) -> bytes:
    return message_field(2, kind) + message_field(3, message_field(1, data))


def attribute(name: str, value: bytes) -> bytes:
    return message_field(5, named(name, value))


def operand(name: str, binding: bytes) -> bytes:
    return message_field(2, named(name, message_field(1, binding)))


def variable(name: str) -> bytes:
    return message_field(1, name.encode())


def operation(kind: str, body: bytes) -> bytes:
    return message_field(3, message_field(1, kind.encode()) + body)


def model(shape: list[int | None], array: bytes, operations: bytes, constant: str) -> bytes:
    """``output = add(x=input, y=constant)`` after ``operations``, in a model of specification 9, opset CoreML7."""
    kind = tensor(FLOAT32, shape)
    result = message_field(3, named("output", kind))
    add = operation("add", operand("x", variable("input")) + operand("y", variable(constant)) + result)
    block = message_field(2, b"output") + operations + add
    opset = message_field(2, b"CoreML7")
    function = (
        message_field(1, named("input", kind))
        + opset
        + message_field(3, message_field(1, b"CoreML7") + message_field(2, block))
    )
    program = varint_field(1, 1) + message_field(2, named("main", function))
    feature = message_field(3, message_field(5, array))
    interface = message_field(1, message_field(1, b"input") + feature)
    interface += message_field(10, message_field(1, b"output") + feature)
    return varint_field(1, 9) + message_field(2, interface) + message_field(502, program)


def weighted_legacy() -> bytes:
    ranges = [message_field(1, varint_field(1, low) + varint_field(2, 4)) for low in (1, 4)]
    array = message_field(1, b"\x01\x04") + FLOAT32_ARRAY + message_field(31, b"".join(ranges))
    kind = tensor(FLOAT32, [4])
    value = message_field(2, kind) + message_field(5, BLOB)
    const = operation("const", message_field(3, named("weight", kind)) + attribute("val", value))
    return model([None, 4], array, const, "weight")


def fp16() -> bytes:
    half, bits = tensor(FLOAT16, [5]), struct.pack("<5H", 1, 0xA8, 0x3FF, 0x400, 0x80A8)
    value = literal(half, message_field(7, message_field(1, bits)))
    const = operation("const", message_field(3, named("half", half)) + attribute("val", value))
    dtype = literal(tensor(STRING, []), message_field(4, message_field(1, b"fp32")))
    operands = operand("dtype", message_field(2, dtype)) + operand("x", variable("half"))
    cast = operation("cast", operands + message_field(3, named("constant", tensor(FLOAT32, [5]))))
    return model([5], message_field(1, b"\x05") + FLOAT32_ARRAY, const + cast, "constant")


def quant() -> bytes:
    scale = literal(tensor(FLOAT32, []), message_field(1, message_field(1, struct.pack("<f", 0.5))))
    body = message_field(3, named("constant", tensor(FLOAT32, [4])))
    body += attribute("zero_point", literal(tensor(INT8, []), message_field(7, message_field(1, b"\xff"))))
    body += attribute("scale", scale)
    body += attribute("quantized_data", message_field(2, tensor(INT8, [4])) + message_field(5, BLOB))
    body += attribute("axis", literal(tensor(INT32, []), message_field(2, message_field(1, b"\x00"))))
    constant = operation("constexpr_affine_dequantize", body)
    return model([4], message_field(1, b"\x04") + FLOAT32_ARRAY, constant, "constant")


def weight_file(code: int, data: bytes) -> bytes:
    record = struct.pack("<IIQQ32x", 0xDEADBEEF, code, len(data), 128)
    return struct.pack("<II56x", 1, 2) + record.ljust(64, b"\0") + data.ljust(64, b"\0")


GOLDEN = {
    "weighted-legacy": (
        weighted_legacy(),
        weight_file(2, struct.pack("<4f", 2, -3, 5, -7)),
        "5a22be434969e5aa33f89988ff3d8bacbc011223dec118f81d0fb0b3e72e791a",
        "a1dc9e411898feb29e3f89ed718878d3af61cfb30b4882cd094488ff4408cfcc",
        {"Ios17.add": 1},
        ("Float32", "Float32"),
    ),
    "fp16": (
        fp16(),
        b"",
        "c855b6bb5f85482f88eb8f0f2d966e989a5dbf6cb7ad293f23e35715c58dbb07",
        "f1df53cf37b1d6e1e74b2ecf71bedcb25f581ed56b051de9a3a8c8dc374dceff",
        {"Ios17.add": 1, "Ios17.cast": 1},
        ("Mixed (Float16, Float32)", None),
    ),
    "quant": (
        quant(),
        weight_file(4, bytes([0x80, 0xFF, 0, 0x7F])),
        "1a2c4ff3a6a049dc083e0cf2cba4b4e5e6beab81e14e7f0025a77a1c64feb45d",
        "f3600551033ee25001fa58f8f84de6bb2ea28eccd0fe536043d46f1923a066d6",
        {"Ios17.add": 1, "Ios16.constexprAffineDequantize": 1},
        ("Float32", "Int8"),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_equal_those_of_apples_compiler(name: str, tmp_path: Path) -> None:
    source, weights, source_sha, container_sha, histogram, precisions = GOLDEN[name]
    assert hashlib.sha256(source).hexdigest() == source_sha
    (tmp_path / "input.mlmodel").write_bytes(source)
    if weights:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "weights.bin").write_bytes(weights)
    compiled = compile_package(tmp_path / "input.mlmodel", tmp_path / "out").path
    assert hashlib.sha256((compiled / "coremldata.bin").read_bytes()).hexdigest() == container_sha
    metadata = json.loads((compiled / "metadata.json").read_text())[0]
    assert metadata["mlProgramOperationTypeHistogram"] == histogram
    assert (metadata["computePrecision"], metadata.get("storagePrecision")) == precisions
    if weights:
        assert (compiled / "weights" / "weights.bin").read_bytes() == weights


def test_text_of_the_golden_models_shows_ranges_subnormals_and_attributes(tmp_path: Path) -> None:
    texts = {}
    for name, (source, weights, *_) in GOLDEN.items():
        folder = tmp_path / name
        (folder / "weights").mkdir(parents=True)
        (folder / "input.mlmodel").write_bytes(source)
        (folder / "weights" / "weights.bin").write_bytes(weights)
        texts[name] = (compile_package(folder / "input.mlmodel", folder).path / "model.mil").read_text()
    assert (
        "    func main<ios17>(tensor<fp32, [?, 4]> input) [FlexibleShapeInformation = tuple<tuple<string, "
        "dict<string, tensor<int32, [?]>>>, tuple<string, dict<string, list<tensor<int32, [2]>, ?>>>>"
        '((("DefaultShapes", {{"input", [1, 4]}}), ("RangeDims", {{"input", [[1, 4], [4, 4]]}})))] {\n'
    ) in texts["weighted-legacy"]
    assert "[0x1p-24, 0x1.5p-17, 0x1.ff8p-15, 0x1p-14, -0x1.5p-17]" in texts["fp16"]
    assert 'cast(dtype = string("fp32"), x = half);' in texts["fp16"]
    assert "scale = fp32(0x1p-1), zero_point = int8(-1)];" in texts["quant"]


@needs_pairs
@pytest.mark.parametrize("pair", PAIRS, ids=lambda path: path.name)
def test_real_pair_is_reproduced(pair: Path, tmp_path: Path) -> None:
    package, apple = pair / f"{pair.name}.mlpackage", pair / f"{pair.name}.mlmodelc"
    ours = compile_package(package, tmp_path, versions=compiler_versions(apple)).path
    assert list(differences(ours, apple)) == []


def tree(folder: Path) -> Iterable[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@needs_pairs
@pytest.mark.parametrize("pair", PAIRS, ids=lambda path: path.name)
def test_apples_compiled_model_reads_back_as_its_package(pair: Path) -> None:
    package = open_package(pair / f"{pair.name}.mlpackage").model
    compiled = read_compiled(pair / f"{pair.name}.mlmodelc")
    assert compiled.interfaces == package.interfaces
    assert compiled.metadata == package.metadata
    ours, theirs = compiled.program.functions["main"], package.program.functions["main"]
    ordered = sorted(theirs.inputs, key=lambda item: item.name)
    assert ours == replace(theirs, inputs=tuple(ordered))
    for dialect in Dialect:
        assert parse_text(program_text(package.program, dialect)) == package.program


@needs_pairs
def test_compiling_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    package = PAIRS[0] / f"{PAIRS[0].name}.mlpackage"
    shutil.copytree(package, tmp_path / "copy.mlpackage")
    first = compile_package(package, tmp_path / "1", "model").path
    second = compile_package(tmp_path / "copy.mlpackage", tmp_path / "2", "model").path
    assert {file: (first / file).read_bytes() for file in tree(first) if (first / file).is_file()} == {
        file: (second / file).read_bytes() for file in tree(second) if (second / file).is_file()
    }
