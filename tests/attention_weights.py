"""Where a program's attention weights go: what a softmax gives, and the products that it is a factor of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.program import Operation, Value, operations

ON_THE_WAY = ("cast", "mul", "add", "reshape", "identity", "expand_dims", "squeeze")


def products(model: Model) -> dict[str, bool]:
    """The products that take attention weights as a factor, by name, and whether they take them transposed: by an
    operand of their own, or by an operation before."""
    found: dict[str, bool] = {}
    weights: dict[str, bool] = {}  # by name, whether they are transposed
    constants: dict[str, Value] = {}
    for operation in operations(model.function.block):
        taken = {
            slot: weights[name]
            for slot, names in operation.inputs.items()
            for name in names
            if isinstance(name, str) and name in weights
        }
        out = operation.outputs[0].name
        if operation.type == "const":
            constants[out] = operation.attributes["val"]
        elif operation.type == "softmax":
            weights[out] = False
        elif operation.type == "transpose" and taken:
            weights[out] = not any(taken.values())
        elif operation.type in ON_THE_WAY and taken:
            weights[out] = any(taken.values())
        elif operation.type == "matmul" and taken:
            found[out] = any(
                flipped != _is_set(operation, f"transpose_{slot}", constants) for slot, flipped in taken.items()
            )
    return found


def _is_set(operation: Operation, name: str, constants: Mapping[str, Value]) -> bool:
    for binding in operation.inputs.get(name, ()):
        value = constants[binding] if isinstance(binding, str) else binding
        return bool(np.asarray(value.data).item())
    return False
