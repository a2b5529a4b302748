"""The program as the compiler prints it: inputs sorted, the compiler's versions noted, flexible shapes declared."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping

import numpy as np

from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.program import (
    DictType,
    DType,
    Feature,
    Function,
    FunctionInterface,
    ListType,
    Program,
    TensorType,
    TupleType,
    Value,
    ValueType,
)
from diffusion_runtime.mil.text_print import Dialect

_STRING = TensorType(DType.STRING)
_BUILD_INFO = DictType(_STRING, _STRING)
_SHAPE = TensorType(DType.INT32, (None,))
_SHAPES = DictType(_STRING, _SHAPE)
_RANGES = ListType(TensorType(DType.INT32, (2,)))


def dialect(specification_version: int) -> Dialect:
    """The text's dialect follows the specification, not the opset."""
    return Dialect.V1_3 if specification_version >= 9 else Dialect.V1_0


def compiled_program(model: Model, versions: Mapping[str, str]) -> Program:
    """``model``'s program with ``versions`` (of the compiler) added to its build information."""
    known = model.program.attributes.get("buildInfo")
    pairs = {_text(key): _text(value) for key, value in _pairs(known)} | dict(versions)
    info = Value(_BUILD_INFO, tuple((Value(_STRING, key), Value(_STRING, pairs[key])) for key in sorted(pairs)))
    functions = {
        name: _compiled_function(function, model.interface) for name, function in model.program.functions.items()
    }
    return dataclasses.replace(model.program, functions=functions, attributes={"buildInfo": info})


def _compiled_function(function: Function, interface: FunctionInterface) -> Function:
    flexible = sorted(
        (item for item in interface.inputs if item.shape_range or item.enumerated_shapes),
        key=lambda item: item.name,
    )
    return dataclasses.replace(
        function,
        # Apple's compiler prints inputs in the order of their names, whatever the package's.
        inputs=tuple(sorted(function.inputs, key=lambda variable: variable.name)),
        blocks={function.opset: function.block},
        attributes={"FlexibleShapeInformation": _flexible_shapes(flexible)} if flexible else {},
    )


def _flexible_shapes(features: list[Feature]) -> Value:
    defaults = [(item.name, Value(_SHAPE, np.array(item.shape, "<i4"))) for item in features]
    ranges = [
        (item.name, Value(_RANGES, tuple(_range(bounds) for bounds in item.shape_range)))
        for item in features
        if item.shape_range
    ]
    enumerated = dict(_enumerated(item.name, shape) for item in features for shape in item.enumerated_shapes)
    sections = [_section("DefaultShapes", _SHAPE, defaults)]
    if ranges:
        sections.append(_section("RangeDims", _RANGES, ranges))
    if enumerated:
        sections.append(_section("EnumeratedShapes", _SHAPES, sorted(enumerated.items())))
    return Value(TupleType(tuple(section.type for section in sections)), tuple(sections))


def _enumerated(name: str, shape: tuple[int, ...]) -> tuple[str, Value]:
    """One shape by its key. Apple's keys have eight hexadecimal digits; what they are derived from is not known,
    only that each differs."""
    key = f"{zlib.crc32(f'{name} {list(shape)}'.encode()):08x}"
    return key, Value(_SHAPES, ((Value(_STRING, name), Value(_SHAPE, np.array(shape, "<i4"))),))


def _range(bounds: tuple[int, int]) -> Value:
    return Value(_RANGES.element, np.array(bounds, "<i4"))


def _section(name: str, kind: ValueType, entries: list[tuple[str, Value]]) -> Value:
    mapping = DictType(_STRING, kind)
    pairs = tuple((Value(_STRING, key), value) for key, value in entries)
    return Value(TupleType((_STRING, mapping)), (Value(_STRING, name), Value(mapping, pairs)))


def _pairs(value: Value | None) -> list[tuple[Value, Value]]:
    data = value.data if value is not None and isinstance(value.data, tuple) else ()
    return [pair for pair in data if isinstance(pair, tuple)]


def _text(value: Value) -> str:
    return value.data if isinstance(value.data, str) else str(value.data)
