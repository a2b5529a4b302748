"""Copying a program: with some operations replaced, and its stored values moved to another weight file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from diffusion_runtime.mil.package import MODEL_PATH, Package
from diffusion_runtime.mil.program import Blob, Block, DType, Operation, Program, TensorType, Value
from diffusion_runtime.mil.weights import WeightWriter

WEIGHT_PATH = f"{MODEL_PATH}/weights/weight.bin"
"""Where a package's values are stored, as MIL spells it."""

Values = Callable[[Value], Value]
Operations = Callable[[Operation], Operation | None]


def rewrite(program: Program, values: Values, operations: Operations = lambda _: None) -> Program:
    """``program`` with every literal, however deep, replaced by what ``values`` makes of it.

    ``operations`` is asked first: what it returns stands in the operation's place as it is, None leaves the
    operation to ``values``. Both are called in the program's order.
    """

    def of_block(block: Block) -> Block:
        return replace(block, operations=tuple(of_operation(operation) for operation in block.operations))

    def of_operation(operation: Operation) -> Operation:
        replaced = operations(operation)
        if replaced is not None:
            return replaced
        return replace(
            operation,
            inputs={
                name: tuple(values(item) if isinstance(item, Value) else item for item in bindings)
                for name, bindings in operation.inputs.items()
            },
            attributes={name: values(value) for name, value in operation.attributes.items()},
            blocks=tuple(of_block(block) for block in operation.blocks),
        )

    functions = {
        name: replace(function, blocks={opset: of_block(block) for opset, block in function.blocks.items()})
        for name, function in program.functions.items()
    }
    return replace(program, functions=functions)


def stored_in(writer: WeightWriter, package: Package) -> Values:
    """For `rewrite`: what ``package`` stores goes to ``writer``, each value once however often it is used. Memory:
    one value at a time."""
    return stored_by(lambda array, dtype: Blob(WEIGHT_PATH, writer.add(array, dtype)), package)


def stored_by(put: Callable[[np.ndarray, DType], Blob], package: Package) -> Values:
    """As `stored_in`, where ``put`` stores a value."""
    moved: dict[Blob, Blob] = {}

    def move(value: Value) -> Value:
        if not isinstance(value.data, Blob) or not isinstance(value.type, TensorType):
            return value
        if value.data not in moved:
            moved[value.data] = put(package.array(value), value.type.dtype)
            package.weight_file(value.data).release()
        return replace(value, data=moved[value.data])

    return move
