"""MIL text: parse(print(program)) == program for arbitrary programs, exact spellings, errors that name the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_runtime.errors import DiffusionError, PackageError, UnsupportedError
from diffusion_runtime.mil.program import (
    Blob,
    Block,
    DictType,
    DType,
    Function,
    ListType,
    Operation,
    Program,
    StateType,
    TensorType,
    TupleType,
    Value,
    ValueType,
    Variable,
    numpy_dtype,
    packed_bits,
)
from diffusion_runtime.mil.text import read_compiled
from diffusion_runtime.mil.text_parse import parse_text, read_text
from diffusion_runtime.mil.text_print import Dialect, float_text, program_text

NUMBERS = [dtype for dtype in DType if dtype is not DType.STRING]
IDENTIFIERS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_@]{0,8}x", fullmatch=True)
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)


def values_of(kind: ValueType) -> st.SearchStrategy[Value]:
    match kind:
        case TensorType(DType.STRING, ()):
            return st.text(max_size=5).map(lambda text: Value(kind, text))
        case TensorType():
            return arrays_of(kind).map(lambda array: Value(kind, array))
        case ListType(element, length):
            sizes = (0, 3) if length is None else (length, length)
            items = st.lists(values_of(element), min_size=sizes[0], max_size=sizes[1])
            return items.map(lambda found: Value(kind, tuple(found)))
        case TupleType(elements):
            return st.tuples(*map(values_of, elements)).map(lambda found: Value(kind, found))
        case DictType(key, value):
            pairs = st.lists(st.tuples(values_of(key), values_of(value)), max_size=3)
            return pairs.map(lambda found: Value(kind, tuple(found)))
        case StateType():
            raise AssertionError("states have no literals")


def arrays_of(kind: TensorType) -> st.SearchStrategy[np.ndarray]:
    shape = tuple(size or 0 for size in kind.shape)
    count = int(np.prod(shape, dtype=int))
    flat = st.lists(elements_of(kind.dtype), min_size=count, max_size=count)
    return flat.map(lambda found: np.array(found, numpy_dtype(kind.dtype)).reshape(shape))


def elements_of(dtype: DType) -> st.SearchStrategy[Any]:
    if dtype is DType.STRING:
        return st.text(max_size=4)
    if dtype is DType.BOOL:
        return st.booleans()
    kind = numpy_dtype(dtype)
    if kind.kind == "f":
        widths: dict[int, Literal[16, 32, 64]] = {2: 16, 4: 32, 8: 64}
        return st.floats(allow_nan=False, width=widths[kind.itemsize])
    bits = packed_bits(dtype) or kind.itemsize * 8
    low = -(1 << bits - 1) if kind.kind == "i" else 0
    return st.integers(low, low + (1 << bits) - 1)


TENSORS = st.builds(TensorType, st.sampled_from(list(DType)), SHAPES)
TYPES: st.SearchStrategy[ValueType] = st.recursive(
    TENSORS,
    lambda inner: st.one_of(
        st.builds(ListType, inner, st.one_of(st.none(), st.integers(0, 2))),
        st.builds(TupleType, st.lists(inner, min_size=1, max_size=2).map(tuple)),
        st.builds(DictType, st.just(TensorType(DType.STRING)), inner),
    ),
    max_leaves=3,
)
BLOBS = st.builds(
    lambda dtype, shape, path, offset: Value(TensorType(dtype, shape), Blob(path, offset)),
    st.sampled_from(NUMBERS),
    SHAPES,
    st.text(max_size=8).map("@model_path/{}".format),
    st.integers(0, 2**63),
)
VALUES = st.one_of(TYPES.flatmap(values_of), BLOBS)
BINDINGS = st.lists(st.one_of(IDENTIFIERS, VALUES), min_size=1, max_size=3).map(tuple)
DECLARED = st.builds(
    TensorType, st.sampled_from(list(DType)), st.lists(st.sampled_from([None, 1, 2]), max_size=3).map(tuple)
)
VARIABLES = st.builds(Variable, IDENTIFIERS, st.one_of(DECLARED, TYPES, DECLARED.map(StateType)))
OPERATIONS = st.builds(
    Operation,
    IDENTIFIERS,
    st.dictionaries(IDENTIFIERS, BINDINGS, max_size=3),
    st.lists(VARIABLES, max_size=2).map(tuple),
    st.dictionaries(IDENTIFIERS, VALUES, max_size=2),
)
FUNCTIONS = st.builds(
    lambda inputs, operations, outputs, attributes: Function(
        tuple(inputs), "CoreML7", {"CoreML7": Block(tuple(operations), tuple(outputs))}, attributes
    ),
    st.lists(VARIABLES, max_size=2),
    st.lists(OPERATIONS, max_size=3),
    st.lists(IDENTIFIERS, max_size=2),
    st.dictionaries(IDENTIFIERS, VALUES, max_size=1),
)
PROGRAMS = st.builds(
    lambda functions, attributes: Program(functions, attributes=attributes),
    st.dictionaries(IDENTIFIERS, FUNCTIONS, min_size=1, max_size=2),
    st.dictionaries(IDENTIFIERS, VALUES, max_size=1),
)


@settings(max_examples=60, deadline=None)
@given(PROGRAMS, st.sampled_from(Dialect))
def test_printing_and_parsing_are_inverse(program: Program, dialect: Dialect) -> None:
    assert parse_text(program_text(program, dialect)) == program


@settings(max_examples=80, deadline=None)
@given(PROGRAMS, st.data())
def test_damaged_text_is_an_error_with_one_line_or_another_program(program: Program, data: st.DataObject) -> None:
    text = program_text(program, Dialect.V1_3)
    cut = data.draw(st.integers(0, len(text) - 1))
    damaged = (
        text[:cut] + data.draw(st.sampled_from(["", "(", "]", "{", '"', "?", "-", "x", "\0"])) + text[cut + 1 :]
    )
    try:
        parse_text(damaged, "model.mil")
    except DiffusionError as error:
        assert str(error).startswith("model.mil: ")
        assert "\n" not in str(error)


def program_of(*operations: Operation) -> Program:
    return Program({"main": Function((), "CoreML6", {"CoreML6": Block(operations, ())})})


def const(value: Value) -> Program:
    return program_of(Operation("const", {}, (Variable("c", value.type),), {"val": value}))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0x0p+0"),
        (-0.0, "-0x0p+0"),
        (0.5, "0x1p-1"),
        (10000.0, "0x1.388p+13"),
        (-1e-5, "-0x1.4f8b588e368f1p-17"),
        (float(np.float16(6e-8)), "0x1p-24"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
    ],
)
def test_floats_are_hexadecimal_with_the_shortest_mantissa(number: float, text: str) -> None:
    assert float_text(number) == text


def test_dialects_differ_in_scalars_only() -> None:
    program = const(Value(TensorType(DType.INT32), np.array(3, "<i4")))
    line = "            {0} c = const()[val = {0}(3)];\n"
    assert line.format("tensor<int32, []>") in program_text(program, Dialect.V1_0)
    assert line.format("int32") in program_text(program, Dialect.V1_3)


def test_a_file_is_read_as_its_text_and_ends_without_a_line_break(tmp_path: Path) -> None:
    program = const(Value(TensorType(DType.STRING), "é"))
    text = program_text(program, Dialect.V1_0)
    (tmp_path / "model.mil").write_bytes(text.encode())
    assert text.endswith("        } -> ();\n}")
    assert read_text(tmp_path / "model.mil") == program


def test_other_writers_spellings_are_read() -> None:
    text = """program(1.3)
    {
        func main<ios18>(tensor<fp16,[1,2]> x) {
            string t=const()[name=string("t"),val=string("fp32")];
            tensor<fp16, [2]>  h = const()[val = tensor<fp16, [2]>([500.0,-1e-3])];
            tensor<fp32, []> s = const()[val = tensor<fp32, []>(2)];
            write_state(input = x, data = h)[name = string("w")];
            tensor<fp32,[1,2]> y = cast(dtype=t,x=x);
        } -> (y);
    }
    """
    operations = parse_text(text).functions["main"].block.operations
    assert operations[1].attributes["val"] == Value(TensorType(DType.FLOAT16, (2,)), np.array([500, -1e-3], "<f2"))
    assert operations[2].attributes["val"].type == TensorType(DType.FLOAT32)
    assert operations[3].outputs == ()
    assert operations[4].inputs == {"dtype": ("t",), "x": ("x",)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "tensor<fp16, [2]> c = const()[val = tensor<fp16, [2]>([0x1p+0])];",
            "line 4: expected a literal of shape",
        ),
        ("tensor<fp16, [1, 2]> c = const()[val = tensor<fp16, [1, 2]>([0x1p+0, 0x1p+0])];", "line 4: expected '['"),
        ("tensor<int32, [2, 2]> c = const()[val = tensor<int32, [2, 2]>([[1], [1, 2]])];", "rows of one length"),
        ("int8 c = const()[val = int8(200)];", "line 4: expected values of int8, got 200"),
        ("uint4 c = const()[val = uint4(16)];", "line 4: expected values of uint4, got 16"),
        ("fp16 c = const()[val = fp16(0x1p+17)];", "line 4: expected values of fp16"),
        ("fp16 c = const()[val = fp16(nan)];", "line 4: expected values of fp16"),
        ("bool c = const()[val = bool(1)];", "line 4: expected values of bool"),
        ("tensor<fp9, [2]> c = const();", "line 4: expected an element type"),
        ("tensor<fp16, [2 2]> c = const();", "line 4: expected dimensions"),
        ('string c = const()[val = string("x)];', "line 4: expected a quoted string"),
        ("int32 c = const()[val = int32(1), val = int32(1)];", "attribute val only once"),
        ("int32 c = add(x = a, x = b);", "operand x only once"),
        ("int32 c = add(x = a", "line 4: expected a type, got 'a'"),
        ("int32 c = add(x = a) y", "line 4: expected ; after an operation"),
        ("state<int32> c = const()[val = state<int32>(1)];", "no literal of a state"),
        (f"{'list<' * 40}int32{', ?>' * 40} c = const();", "at most 32 nested"),
        (f"tensor<int32, [{'1, ' * 40}1]> c = const();", "at most 32 dimensions"),
    ],
)
def test_errors_name_the_line_and_what_was_expected(line: str, expected: str) -> None:
    text = f"program(1.3)\n{{\n    func main<ios17>() {{\n{line}\n        }} -> ();\n}}"
    with pytest.raises(PackageError) as caught:
        parse_text(text, "model.mil")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("program(2.0)\n{}", "version 2.0: expected one of 1.0, 1.3"),
        ("program(1.0)\n{func main<ios99>() { } -> (); }", "opset 'ios99'"),
        ("program(1.0)\n{func main<ios17>() { int32 c = cond(p = x) { } } -> (); }", "cond has nested blocks"),
    ],
)
def test_forms_that_are_not_covered_are_named(text: str, expected: str) -> None:
    with pytest.raises(UnsupportedError, match=r"model\.mil: ") as caught:
        parse_text(text, "model.mil")
    assert expected in str(caught.value)


NAN = Value(TensorType(DType.FLOAT32), np.array(np.nan, "<f4"))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (const(NAN), "NaN"),
        (program_of(Operation("add", {}, (Variable("a] ; evil", TensorType(DType.INT32)),))), "'a] ; evil'"),
        (program_of(Operation("add", {}, (Variable("state", TensorType(DType.INT32)),))), "'state' is a word"),
        (program_of(Operation("cond", {}, (), blocks=(Block((), ()),))), "cond has nested blocks"),
        (Program({"main": Function((), "CoreML99", {"CoreML99": Block((), ())})}), "opset 'CoreML99'"),
    ],
)
def test_what_text_cannot_express_is_refused(program: Program, expected: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        program_text(program, Dialect.V1_0)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (None, "cannot be read"),
        (b"\0" * 10, "truncated"),
        (b"\0" * 200, "kind 0"),
        ((502).to_bytes(4, "little") + bytes(196), "damaged"),
    ],
)
def test_a_damaged_compiled_model_is_refused(container: bytes | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / "model.mil").write_text(program_text(program_of(), Dialect.V1_0))
    if container is not None:
        (tmp_path / "coremldata.bin").write_bytes(container)
    with pytest.raises(DiffusionError, match=expected):
        read_compiled(tmp_path)
