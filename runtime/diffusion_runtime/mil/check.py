"""Whether a program can run here: everything that is missing or wrong, named at once, before any work starts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from diffusion_runtime.errors import PackageError, UnsupportedError
from diffusion_runtime.mil.model import undefined
from diffusion_runtime.mil.ops.registry import OPS, Op
from diffusion_runtime.mil.package import Package
from diffusion_runtime.mil.program import Blob, Block, Function, Operation, TensorType, Value, ValueType, operations

CONST = "const"
_NAMED = 8  # faults quoted in one message
LEAST_BUDGET = 1 << 28
_PER_BYTE = 1024


def check_package(package: Package) -> None:
    """Raise UnsupportedError (ops or parameters that are not known) or PackageError (operands without definition,
    names defined twice, blobs that are not where they should be)."""
    for name, function in package.model.program.functions.items():
        where = f"{package.path}: function {name}"
        unknown = _unknown_ops(function)
        if unknown:
            raise UnsupportedError(f"{where}: {len(unknown)} MIL op(s) not covered: {', '.join(unknown)}")
        _raise(UnsupportedError, f"{where}: operands not covered", _unknown_parameters(function.block))
        _raise(PackageError, f"{where}: damaged", [*undefined(function), *_bad_blobs(package, function.block)])
        _raise(UnsupportedError, f"{where}: too large", _too_large(function, budget(package)))


def budget(package: Package) -> int:
    """The most bytes that one value of the program may take, by what the package brings: its files and its inputs.

    A program of a few lines can ask for tensors that no machine has room for. Those of networks grow with their
    weights and inputs: the largest, attention scores, are about a hundred times as large.
    """
    functions = package.model.program.functions.values()
    taken = sum(size_bytes(variable.type) for function in functions for variable in function.inputs)
    return LEAST_BUDGET + _PER_BYTE * (package.stored_bytes() + taken)


def size_bytes(kind: ValueType) -> int:
    """What a value takes in a run in float32; an unknown size counts once."""
    return 4 * math.prod(1 if size is None else size for size in kind.shape) if isinstance(kind, TensorType) else 0


def _too_large(function: Function, limit: int) -> list[str]:
    """What is declared to be larger than ``limit``; `lower` finds what would be, whatever is declared."""
    faults = []
    for operation in operations(function.block):
        declared = max((size_bytes(variable.type) for variable in operation.outputs), default=0)
        if declared > limit:
            faults.append(
                f"{operation.type} {output_name(operation)} gives {declared / 1e9:.1f} GB, expected at most "
                f"{limit / 1e9:.1f} GB for a model of this size"
            )
    return faults


def operands(operation: Operation) -> Mapping[str, tuple[str | Value, ...]]:
    """An op's operands by parameter. iOS 16 gives those of compressed weights as attributes."""
    if operation.type == CONST:
        return {}
    attributes = {name: (value,) for name, value in operation.attributes.items() if name != "name"}
    return {**operation.inputs, **(attributes if operation.type.startswith("constexpr_") else {})}


def output_name(operation: Operation) -> str:
    """The name by which messages call an operation."""
    return operation.outputs[0].name if operation.outputs else "(no output)"


def _raise(kind: type[Exception], head: str, faults: list[str]) -> None:
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise kind(f"{head}: {'; '.join(faults[:_NAMED])}{more}")


def _unknown_ops(function: Function) -> list[str]:
    used = Counter(operation.type for operation in operations(function.block))
    return [f"{name} ({count})" for name, count in sorted(used.items()) if name not in OPS and name != CONST]


def _unknown_parameters(block: Block) -> list[str]:
    faults = []
    strings = {}
    for operation in block.operations:
        if operation.type == CONST:
            value = operation.attributes.get("val")
            if value is not None and isinstance(value.data, str):
                strings[operation.outputs[0].name] = value.data
            continue
        given = operands(operation)
        where = f"{operation.type} {output_name(operation)}"
        faults += [f"{where}: {fault}" for fault in _faults(OPS[operation.type], given, strings)]
    return faults


def _faults(op: Op, given: Mapping[str, tuple[str | Value, ...]], strings: Mapping[str, str]) -> Iterator[str]:
    for name, parameter in op.parameters.items():
        if parameter.required and name not in given and not parameter.is_filled_in:
            yield f"parameter {name} is missing"
    for name, bindings in given.items():
        if name not in op.parameters or op.parameters[name].is_filled_in:
            yield f"parameter {name} is unknown"
        elif op.parameters[name].choices:
            value = bindings[0].data if isinstance(bindings[0], Value) else strings.get(bindings[0])
            if value not in op.parameters[name].choices:
                yield f"{name} {value!r} is unknown; known: {', '.join(op.parameters[name].choices)}"


def _bad_blobs(package: Package, block: Block) -> list[str]:
    faults = []
    for operation in operations(block):
        for _, value in operation.values:
            if isinstance(value.data, Blob) and isinstance(value.type, TensorType):
                try:
                    package.check_blob(value)
                except PackageError as error:
                    faults.append(f"{operation.type} {output_name(operation)}: {error}")
    return faults
