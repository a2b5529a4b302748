"""Floating-point operations per call, from the types alone. A multiplication and an addition count as two."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from diffusion_runtime.mil.program import Function, Operation, TensorType, Value, operations

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """``by_operation`` maps an operation's type to its floating-point operations; ``unknown`` counts those
    whose shapes are not known before run time."""

    by_operation: Mapping[str, int]
    unknown: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_operation.values())


class _Shapes:
    """Shapes and constants of a function's values by name."""

    def __init__(self, function: Function) -> None:
        variables = [*function.inputs, *(item for op in operations(function.block) for item in op.outputs)]
        self._types = {variable.name: variable.type for variable in variables}
        self._constants = {
            op.outputs[0].name: op.attributes["val"]
            for op in operations(function.block)
            if op.type == "const" and "val" in op.attributes
        }

    def operand(self, operation: Operation, name: str, index: int = 0) -> Shape:
        """Raises KeyError or ValueError where the shape is not known."""
        binding = operation.inputs[name][index]
        kind = binding.type if isinstance(binding, Value) else self._types[binding]
        return known(kind)

    def constant(self, operation: Operation, name: str, default: object) -> object:
        """A scalar operand's value: a bool, number or str."""
        if name not in operation.inputs:
            return default
        binding = operation.inputs[name][0]
        value = binding if isinstance(binding, Value) else self._constants[binding]
        return value.data.item() if isinstance(value.data, np.ndarray) else value.data


def known(kind: object) -> Shape:
    """The shape of a tensor type. Raises ValueError where a dimension is not known or it is no tensor."""
    if not isinstance(kind, TensorType):
        raise ValueError("not a tensor")
    if any(size is None for size in kind.shape):
        raise ValueError("a dimension is not known")
    return tuple(size for size in kind.shape if size is not None)


def floating_point_work(function: Function) -> Work:
    """The work of convolutions, matrix products and attention; element-wise operations are left out."""
    shapes = _Shapes(function)
    found: dict[str, int] = {}
    unknown = 0
    for operation in operations(function.block):
        count = _COUNTS.get(operation.type)
        if count is None:
            continue
        try:
            found[operation.type] = found.get(operation.type, 0) + 2 * count(operation, shapes)
        except (KeyError, ValueError, IndexError):
            unknown += 1
    return Work(dict(sorted(found.items())), unknown)


def _output(operation: Operation) -> Shape:
    return known(operation.outputs[0].type)


def _conv(operation: Operation, shapes: _Shapes) -> int:
    return math.prod(_output(operation)) * math.prod(shapes.operand(operation, "weight")[1:])


def _conv_transpose(operation: Operation, shapes: _Shapes) -> int:
    return math.prod(shapes.operand(operation, "x")) * math.prod(shapes.operand(operation, "weight")[1:])


def _linear(operation: Operation, shapes: _Shapes) -> int:
    return math.prod(_output(operation)) * shapes.operand(operation, "weight")[-1]


def _matmul(operation: Operation, shapes: _Shapes) -> int:
    x = shapes.operand(operation, "x")
    summed = x[-2] if shapes.constant(operation, "transpose_x", False) and len(x) > 1 else x[-1]
    return math.prod(_output(operation)) * summed


def _einsum(operation: Operation, shapes: _Shapes) -> int:
    equation = str(shapes.constant(operation, "equation", ""))
    terms = re.sub(r"\s", "", equation).partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for index, term in enumerate(terms):
        sizes |= dict(zip(term, shapes.operand(operation, "values", index), strict=True))
    return math.prod(sizes.values())


def _attention(operation: Operation, shapes: _Shapes) -> int:
    query, key = shapes.operand(operation, "query"), shapes.operand(operation, "key")
    value = shapes.operand(operation, "value")
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_COUNTS: Mapping[str, Callable[[Operation, _Shapes], int]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
