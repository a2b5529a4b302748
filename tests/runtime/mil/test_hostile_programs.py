"""Programs that are damaged or hostile: refused in one line, before memory or time are spent on them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_convert.compile import compile_package
from diffusion_convert.inspect import inspect
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.errors import DiffusionError, PackageError, UnsupportedError
from diffusion_runtime.mil.description import serialize
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.ops.registry import OPS
from diffusion_runtime.mil.package import open_package, write_package
from diffusion_runtime.mil.program import (
    Block,
    DType,
    Feature,
    Function,
    FunctionInterface,
    Operation,
    Program,
    TensorType,
    Value,
    Variable,
)
from diffusion_runtime.mil.text_parse import parse_text

F32, I32 = DType.FLOAT32, DType.INT32


def ints(*values: int) -> Value:
    return Value(TensorType(I32, (len(values),)), np.array(values, "<i4"))


def scalar(value: float) -> Value:
    return Value(TensorType(F32), np.array(value, "<f4"))


def const(name: str, value: Value) -> Operation:
    return Operation("const", {}, (Variable(name, value.type),), {"val": value})


def model(*operations: Operation, output: str = "y", described: str = "y", shape: tuple[int, ...] = (4,)) -> Model:
    """``y = relu(x)`` after ``operations``, which may make ``x``."""
    kind = TensorType(F32, shape)
    relu = Operation("relu", {"x": ("x",)}, (Variable("y", kind),))
    function = Function((Variable("x", kind),), "CoreML6", {"CoreML6": Block((*operations, relu), (output,))})
    inputs, outputs = ((Feature(name, "multiArray", "Float32", shape),) for name in ("x", described))
    return Model(7, Program({"main": function}), serialize((FunctionInterface("main", inputs, outputs),)))


def made(kind: str, declared: tuple[int, ...], /, **inputs: tuple[str | Value, ...]) -> Operation:
    return Operation(kind, inputs, (Variable("large", TensorType(F32, declared)),))


ONE = const("one", Value(TensorType(F32, (1,)), np.ones(1, "<f4")))
COLUMN = const("column", Value(TensorType(F32, (20_000, 1)), np.ones((20_000, 1), "<f4")))
ROW = const("row", Value(TensorType(F32, (1, 20_000)), np.ones((1, 20_000), "<f4")))
N = 20_000
LARGE: dict[str, tuple[Operation, ...]] = {
    "fill": (made("fill", (1 << 30, 4), shape=(ints(1 << 30, 4),), value=(scalar(1.0),)),),
    "fill, declared small": (made("fill", (4,), shape=(ints(1 << 30, 4),), value=(scalar(1.0),)),),
    "tile": (ONE, made("tile", (1 << 30,), x=("one",), reps=(ints(1 << 30),))),
    "tile, declared small": (ONE, made("tile", (4,), x=("one",), reps=(ints(1 << 30),))),
    "pad, declared small": (ONE, made("pad", (4,), x=("one",), pad=(ints(0, 1 << 30),))),
    "broadcast": (COLUMN, ROW, made("add", (N, N), x=("column",), y=("row",))),
    "broadcast, declared small": (COLUMN, ROW, made("add", (4,), x=("column",), y=("row",))),
    "product, declared small": (COLUMN, ROW, made("matmul", (4,), x=("column",), y=("row",))),
    "concat, declared small": (
        COLUMN,
        made("concat", (4,), values=("column",) * 20_000, axis=(Value(TensorType(I32), np.array(0, "<i4")),)),
    ),
    "any operation that says so": (made("relu", (1 << 20, 1 << 12), x=("x",)),),
}


@pytest.mark.parametrize("name", LARGE)
def test_programs_that_ask_for_gigabytes_are_refused_before_they_get_them(name: str, tmp_path: Path) -> None:
    write_package(model(*LARGE[name]), tmp_path / "a.mlpackage")
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for stream in (False, True):
        with pytest.raises(UnsupportedError, match=r"a\.mlpackage.*(GB|elements), expected at most"):
            TorchBackend(stream_weights=stream).load(tmp_path / "a.mlpackage")(x=np.ones(4, np.float32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000 * (
        1 + 1023 * (sys.platform == "darwin")
    )
    assert time.process_time() - since < 20


M = 128


def flag() -> Value:
    return Value(TensorType(DType.BOOL), np.array(True))


def text(value: str) -> Value:
    return Value(TensorType(DType.STRING), value)


def whole(value: int) -> Value:
    return Value(TensorType(I32), np.array(value, "<i4"))


def named(
    name: str, kind: str, /, declared: tuple[int, ...] = (4,), dtype: DType = F32, **inputs: object
) -> Operation:
    """An operation whose declared shape is a lie."""
    bound = {key: value if isinstance(value, tuple) else (value,) for key, value in inputs.items()}
    return Operation(kind, bound, (Variable(name, TensorType(dtype, declared)),))


KERNEL = const("kernel", Value(TensorType(F32, (1, 1, 1, 1)), np.ones((1, 1, 1, 1), "<f4")))
ROWS = const("rows", Value(TensorType(F32, (N, 1)), np.ones((N, 1), "<f4")))
AS_COLUMN = named("column", "reshape", x="x", shape=ints(-1, 1))
AS_ROW = named("row", "reshape", x="x", shape=ints(1, -1))
AS_IMAGE = named("image", "reshape", x="x", shape=ints(1, 1, M, M))
INDEX = (
    Operation("cast", {"x": ("x",), "dtype": (text("int32"),)}, (Variable("index", TensorType(I32, (4,))),)),
    Operation("reshape", {"x": ("index",), "shape": (ints(-1, 1),)}, (Variable("places", TensorType(I32, (4,))),)),
    Operation("reshape", {"x": ("index",), "shape": (ints(-1),)}, (Variable("flat", TensorType(I32, (4,))),)),
)
PADS, ONE_SIDE, STRIDES = ints(*[1 << 14] * 4), ints(0, 1 << 14, 0, 1 << 14), ints(1 << 14, 1 << 14)
FALSE: dict[str, tuple[Operation, ...]] = {
    "einsum": (named("large", "einsum", values=("x", "x", "x"), equation=text("ab,cd,ef->abcdef")),),
    "matmul": (AS_COLUMN, AS_ROW, named("large", "matmul", x="column", y="row")),
    "matmul, transposed": (AS_ROW, named("large", "matmul", x="row", y="row", transpose_x=flag())),
    "linear": (AS_COLUMN, ROWS, named("large", "linear", x="column", weight="rows")),
    "add": (AS_COLUMN, AS_ROW, named("large", "add", x="column", y="row")),
    "select": (
        AS_COLUMN,
        AS_ROW,
        Operation(
            "greater", {"x": ("column",), "y": (scalar(0),)}, (Variable("is", TensorType(DType.BOOL, (4,))),)
        ),
        named("large", "select", cond="is", a="column", b="row"),
    ),
    "conv, padded": (
        AS_IMAGE,
        KERNEL,
        named("large", "conv", x="image", weight="kernel", pad_type=text("custom"), pad=PADS, strides=ints(1, 1)),
    ),
    "conv, padded and thinned out": (
        AS_IMAGE,
        KERNEL,
        named("large", "conv", x="image", weight="kernel", pad_type=text("custom"), pad=ONE_SIDE, strides=STRIDES),
    ),
    "conv_transpose": (
        AS_IMAGE,
        KERNEL,
        named("large", "conv_transpose", x="image", weight="kernel", strides=ints(M, M)),
    ),
    "conv_transpose, enlarged": (
        AS_IMAGE,
        KERNEL,
        named("large", "conv_transpose", x="image", weight="kernel", output_shape=ints(1, 1, 1 << 14, 1 << 14)),
    ),
    "avg_pool": (
        AS_IMAGE,
        named("large", "avg_pool", x="image", kernel_sizes=ints(1, 1), pad_type=text("custom"), pad=PADS),
    ),
    "max_pool": (
        AS_IMAGE,
        named("large", "max_pool", x="image", kernel_sizes=ints(1, 1), pad_type=text("custom"), pad=PADS),
    ),
    "tile": (named("large", "tile", x="x", reps=ints(M, M)),),
    "pad": (named("large", "pad", x="x", pad=PADS),),
    "pad, reflected": (named("large", "pad", x="x", pad=ONE_SIDE, mode=text("replicate")),),
    "upsample_nearest_neighbor": (
        named(
            "large", "upsample_nearest_neighbor", x="x", scale_factor_height=scalar(M), scale_factor_width=scalar(M)
        ),
    ),
    "upsample_bilinear": (
        named("large", "upsample_bilinear", x="x", scale_factor_height=scalar(M), scale_factor_width=scalar(M)),
    ),
    "stack": (named("large", "stack", values=("x",) * N, axis=whole(0)),),
    "concat, interleaved": (named("large", "concat", values=("x",) * N, axis=whole(0), interleave=flag()),),
    "gather": (*INDEX, AS_ROW, named("large", "gather", x="row", indices="flat", axis=whole(0))),
    "gather_nd": (*INDEX, AS_ROW, named("large", "gather_nd", x="row", indices="places")),
    "fill": (named("large", "fill", shape=ints(1 << 28), value=scalar(1)),),
    "many that are computed at once": (
        *(named(f"fill{n}", "fill", (1 << 25,), shape=ints(1 << 25), value=scalar(1)) for n in range(8)),
        named("large", "add", x="fill0", y="fill7"),
    ),
    "many that are held at a time": (
        *(named(f"tile{n}", "tile", x="x", reps=ints(M, 8)) for n in range(8)),
        named("large", "concat", values=tuple(f"tile{n}" for n in range(2)), axis=whole(0)),
        *(named(f"sum{n}", "add", x="large", y=f"tile{n}") for n in range(8)),
    ),
}


@pytest.mark.parametrize("name", FALSE)
def test_shapes_are_not_what_a_program_declares_but_what_its_operations_make(name: str, tmp_path: Path) -> None:
    """Of 64 KB that it is given, each makes more than the third of a GB that a program of this size may take."""
    base = model(*FALSE[name], shape=(M, M), output=FALSE[name][-1].outputs[0].name, described="y")
    described = FALSE[name][-1].outputs[0].name
    base = replace(base, description=model(shape=(M, M), described=described).description)
    write_package(base, tmp_path / "a.mlpackage")
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for stream in (False, True):
        with pytest.raises(UnsupportedError, match=r"a\.mlpackage: .*(GB|elements), expected at most"):
            TorchBackend(stream_weights=stream).load(tmp_path / "a.mlpackage")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000 * (
        1 + 1023 * (sys.platform == "darwin")
    )
    assert time.process_time() - since < 10


@pytest.mark.parametrize("shape", [(1 << 50,), (1 << 32, 1 << 32), (0, 1 << 62), (1 << 62, 0, 1 << 62)])
def test_shapes_that_nothing_can_hold_are_refused(shape: tuple[int, ...]) -> None:
    sizes = ", ".join(map(str, shape))
    with pytest.raises(PackageError, match="is beyond"):
        TensorType(F32, shape)
    text = f"program(1.0)\n{{\nfunc main<ios16>(tensor<fp32, [{sizes}]> x) {{\n}} -> (x);\n}}"
    with pytest.raises(PackageError, match=r"line 3: a tensor of shape .* is beyond"):
        parse_text(text)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (model(Operation("const", {}, (Variable("c", TensorType(F32, (4,))),))), "const c has no val"),
        (model(Operation("const", {}, (), {"val": ints(1)})), "const without an output"),
        (model(Operation("constexpr_cast", {}, ())), "constexpr_cast without an output"),
        (model(described="z"), "output 'z' is described, the program's outputs are y"),
        (model(output="nothing", described="nothing"), "output 'nothing' is computed by no operation"),
    ],
)
@pytest.mark.parametrize(
    "reader",
    [open_package, inspect, TorchBackend().load, lambda path: compile_package(path, path.parent)],
    ids=["open", "inspect", "load", "compile"],
)
def test_damaged_programs_are_refused_by_every_reader(
    reader: Callable[[Path], object], damaged: Model, message: str, tmp_path: Path
) -> None:
    write_package(damaged, tmp_path / "a.mlpackage")
    with pytest.raises(PackageError, match=rf"a\.mlpackage: .*{message}"):
        reader(tmp_path / "a.mlpackage")


def test_a_function_that_is_described_and_not_there(tmp_path: Path) -> None:
    base = model()
    functions = dict.fromkeys(("one", "two"), base.program.functions["main"])
    described = serialize([replace(base.interface, name=name) for name in ("one", "three")], None, "one")
    write_package(replace(base, program=Program(functions), description=described), tmp_path / "a.mlpackage")
    with pytest.raises(PackageError, match="function three is described, the program has one, two"):
        open_package(tmp_path / "a.mlpackage")


@pytest.mark.parametrize(
    "text",
    [
        "tensor<fp32, [" + "1, " * 5000 + "1]> x",
        "tensor<fp32, [" + "9" * 5000 + "]> x",
        "list<" * 5000 + "fp32",
        "tuple<" * 5000,
        "dict<string, " * 5000,
    ],
    ids=["rank", "digits", "lists", "tuples", "dicts"],
)
def test_deep_and_long_text_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(PackageError, match=r"line 3: .{1,300}$"):
        parse_text(f"program(1.0)\n{{\nfunc main<ios16>({text}) {{\n}} -> (x);\n}}")


def test_vectors_of_palettes_are_bounded() -> None:
    with pytest.raises(UnsupportedError, match="vectors of 10000 elements"):
        OPS["constexpr_lut_to_dense"].function(
            np.zeros((64, 1), np.uint8), np.zeros((1, 1, 2, 10_000), np.float16), vector_axis=0
        )


def test_damaged_compressed_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    """Fewer packed bits than the shape says, and a scale that does not fit."""
    sizes = Value(TensorType(DType.UINT32, (2,)), np.array([64, 64], "<u4"))
    mask = Value(TensorType(DType.UINT8, (3,)), np.zeros(3, np.uint8))
    data = Value(TensorType(F32, (1,)), np.ones(1, "<f4"))
    attributes = {"mask": mask, "nonzero_data": data, "shape": sizes}
    sparse = Operation("constexpr_sparse_to_dense", {}, (Variable("w", TensorType(F32, (64, 64))),), attributes)
    use = made("add", (64, 64), x=("x",), y=("w",))
    base = model(sparse, use, output="large", described="large", shape=(64, 64))
    write_package(base, tmp_path / "a.mlpackage")
    with pytest.raises(DiffusionError, match=r"a\.mlpackage: w: .*need 512 bytes, got 3"):
        TorchBackend().load(tmp_path / "a.mlpackage")


def test_weights_that_unfold_to_another_shape_than_they_declare_are_refused(tmp_path: Path) -> None:
    indices = Value(TensorType(DType.UINT8, (4,)), np.zeros(4, np.uint8))
    table = Value(TensorType(F32, (256,)), np.ones(256, "<f4"))
    sizes = Value(TensorType(DType.UINT32, (1,)), np.array([4], "<u4"))
    weight = Operation(
        "constexpr_lut_to_dense",
        {},
        (Variable("w", TensorType(F32, (2, 2))),),
        {"indices": indices, "lut": table, "shape": sizes},
    )
    base = model(weight, made("add", (4,), x=("x",), y=("w",)), output="large", described="large")
    write_package(base, tmp_path / "a.mlpackage")
    with pytest.raises(PackageError, match=r"a\.mlpackage: w: holds an array of shape \(4,\), but \(2, 2\) is"):
        TorchBackend().load(tmp_path / "a.mlpackage")


def test_what_models_need_is_not_refused(tmp_path: Path) -> None:
    """Attention scores of 4,096 positions are a thousand times as large as what they are made of."""
    shape = (1, 4096, 8)
    product = Operation(
        "matmul",
        {"x": ("x",), "y": ("x",), "transpose_y": (Value(TensorType(DType.BOOL), np.array(True)),)},
        (Variable("scores", TensorType(F32, (1, 4096, 4096))),),
    )
    write_package(model(product, shape=shape), tmp_path / "a.mlpackage")
    assert TorchBackend().load(tmp_path / "a.mlpackage")(x=torch.zeros(shape).numpy())["y"].shape == shape
