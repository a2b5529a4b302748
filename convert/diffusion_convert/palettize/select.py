"""Which weights of a program are palettized: those of convolutions and linear layers that are large enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from diffusion_runtime.errors import InputError
from diffusion_runtime.mil.package import Package
from diffusion_runtime.mil.program import DType, Function, Operation, TensorType, Value, operations

MIN_ELEMENTS = 2048
_WEIGHT_OF = {"conv": "weight", "conv_transpose": "weight", "linear": "weight"}
_NOT_COMPRESSED = frozenset({"constexpr_cast"})


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant that is to be palettized. ``name`` is its variable's; ``axis`` counts output channels, None where
    its consumers disagree."""

    name: str
    value: Value
    shape: tuple[int, ...]
    axis: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def palettizable(package: Package, embeddings: bool = False) -> dict[str, Weight]:
    """The weights of conv, conv_transpose, linear and matmul with at least 2,048 elements, by name, in order.

    A weight with any other consumer is left alone, but with ``embeddings`` a table read by ``gather`` counts too.
    Raises InputError where weights are compressed already, where there is no such weight, or where functions of the
    program call different weights by one name.
    """
    found: dict[str, Weight] = {}
    for function in package.model.program.functions.values():
        _refuse_compressed(package, function)
        for weight in _weights(function, embeddings):
            if weight.name in found and found[weight.name].value != weight.value:
                raise InputError(f"{package.path}: two functions have different weights named {weight.name}")
            found[weight.name] = weight
    if not found:
        raise InputError(
            f"{package.path}: no weights to palettize: no convolution or linear layer has a float weight of at "
            f"least {MIN_ELEMENTS} elements{'' if embeddings else '; --embeddings adds embedding tables'}"
        )
    return found


def _refuse_compressed(package: Package, function: Function) -> None:
    for operation in operations(function.block):
        if operation.type.startswith("constexpr_") and operation.type not in _NOT_COMPRESSED:
            raise InputError(
                f"{package.path}: {operation.outputs[0].name} is compressed already ({operation.type}); "
                "give the float16 package that it was made from"
            )


def _weights(function: Function, embeddings: bool) -> Iterator[Weight]:
    constants = {
        operation.outputs[0].name: operation.attributes["val"]
        for operation in operations(function.block)
        if operation.type == "const" and "val" in operation.attributes
    }
    uses: dict[str, list[int | None]] = {}
    for operation in operations(function.block):
        for parameter, bindings in operation.inputs.items():
            for name in bindings:
                if isinstance(name, str) and name in constants:
                    uses.setdefault(name, []).append(_channel_axis(operation, parameter, constants, embeddings))
    outputs = set(function.block.outputs)
    for name, value in constants.items():
        axes = uses.get(name, [None])
        if _is_large_float(value) and None not in axes and name not in outputs:
            shape = _shape(value)
            consistent = {axis % len(shape) for axis in axes if axis is not None}
            yield Weight(name, value, shape, consistent.pop() if len(consistent) == 1 else None)


def _channel_axis(
    operation: Operation, parameter: str, constants: Mapping[str, Value], embeddings: bool
) -> int | None:
    """The axis of output channels of a weight used as ``parameter`` of ``operation``; None: no such weight."""
    if _WEIGHT_OF.get(operation.type) == parameter:
        return 1 if operation.type == "conv_transpose" else 0
    if operation.type == "matmul" and parameter in ("x", "y"):
        transposed = _flag(operation, f"transpose_{parameter}", constants)
        return -1 if transposed == (parameter == "x") else -2
    if operation.type == "gather" and parameter == "x" and embeddings:
        return 0
    return None


def _flag(operation: Operation, parameter: str, constants: Mapping[str, Value]) -> bool:
    bindings = operation.inputs.get(parameter, ())
    value = constants.get(bindings[0]) if bindings and isinstance(bindings[0], str) else None
    if bindings and isinstance(bindings[0], Value):
        value = bindings[0]
    return bool(value.data) if value is not None else False


def _is_large_float(value: Value) -> bool:
    return (
        isinstance(value.type, TensorType)
        and value.type.dtype in (DType.FLOAT16, DType.FLOAT32)
        and len(value.type.shape) >= 2
        and math.prod(_shape(value)) >= MIN_ELEMENTS
    )


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(size or 0 for size in value.type.shape) if isinstance(value.type, TensorType) else ()
