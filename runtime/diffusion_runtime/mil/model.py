"""A whole ML Program model: its program, and the description that Core ML shows of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from diffusion_runtime.errors import PackageError
from diffusion_runtime.mil import description
from diffusion_runtime.mil.program import (
    Feature,
    Function,
    FunctionInterface,
    Metadata,
    Program,
    TensorType,
    operations,
)


@dataclass(frozen=True, slots=True)
class Model:
    """What ``model.mlmodel`` says.

    ``description`` is the serialised ModelDescription, kept byte for byte: it may say more than is parsed here, and
    the compiled format carries it verbatim. ``interfaces``, ``metadata`` and ``default_function`` ("" where the
    description declares no functions) are read from it; to change them, replace ``description`` by what
    ``description.serialize`` makes of them. Raises PackageError where the description is damaged.
    """

    specification_version: int
    program: Program
    description: bytes
    is_updatable: bool = False
    interfaces: tuple[FunctionInterface, ...] = field(init=False, repr=False, compare=False)
    metadata: Metadata = field(init=False, repr=False, compare=False)
    default_function: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        interfaces, metadata, default_function = description.parse(self.description)
        object.__setattr__(self, "interfaces", interfaces)
        object.__setattr__(self, "metadata", metadata)
        object.__setattr__(self, "default_function", default_function)

    @property
    def interface(self) -> FunctionInterface:
        """The interface of the default function."""
        name = self.default_function or "main"
        return next((interface for interface in self.interfaces if interface.name == name), self.interfaces[0])

    @property
    def function(self) -> Function:
        """The function that runs where none is named."""
        functions = self.program.functions
        return functions.get(self.default_function or "main") or next(iter(functions.values()))


def check_model(model: Model) -> None:
    """Raise PackageError where constants have no value, operands no definition, or the description and the program
    name different things.

    Every command reads models through this check: what follows may take ``attributes["val"]`` of a constant and a
    declared output for granted.
    """
    if model.specification_version < _FIRST_VERSION:
        raise PackageError(f"specification {model.specification_version}, expected {_FIRST_VERSION} or later")
    faults = [
        *(
            f"function {name}: {fault}"
            for name, item in model.program.functions.items()
            for fault in (*_faults(item), *undefined(item))
        ),
        *(fault for interface in model.interfaces for fault in _undeclared(interface, model)),
    ]
    if faults:
        more = f" and {len(faults) - _QUOTED} more" if len(faults) > _QUOTED else ""
        raise PackageError(f"the program is damaged: {'; '.join(faults[:_QUOTED])}{more}")


_QUOTED = 5  # faults quoted in one message
_FIRST_VERSION = 6  # iOS 15's: there are no ML Programs before


def _faults(function: Function) -> Iterator[str]:
    for operation in operations(function.block):
        name = operation.outputs[0].name if operation.outputs else ""
        if not name and (operation.type == "const" or operation.type.startswith("constexpr_")):
            yield f"{operation.type} without an output"
        elif operation.type == "const" and "val" not in operation.attributes:
            yield f"const {name} has no val"


def undefined(function: Function) -> list[str]:
    """What a function uses and nothing before it defines, and what it defines twice."""
    defined = {variable.name for variable in function.inputs}
    faults = []
    for operation in function.block.operations:
        name = operation.outputs[0].name if operation.outputs else "(no output)"
        for parameter, bindings in operation.inputs.items():
            faults += [
                f"{operation.type} {name}: {parameter} is {binding!r}, which nothing before it defines"
                for binding in bindings
                if isinstance(binding, str) and binding not in defined
            ]
        for variable in operation.outputs:
            if variable.name in defined:
                faults.append(f"{operation.type}: {variable.name!r} is defined twice")
            defined.add(variable.name)
    return faults + [
        f"output {name!r} is computed by no operation" for name in function.block.outputs if name not in defined
    ]


def _undeclared(interface: FunctionInterface, model: Model) -> Iterator[str]:
    functions = model.program.functions
    function = functions.get(interface.name) or (
        model.function if len(functions) == 1 and not model.default_function else None
    )
    if function is None:
        yield f"function {interface.name} is described, the program has {', '.join(functions)}"
        return
    taken = {variable.name for variable in function.inputs}
    for kind, declared, there in (
        ("input", interface.inputs, taken),
        ("output", interface.outputs, set(function.block.outputs)),
    ):
        for feature in declared:
            if feature.name not in there:
                names = ", ".join(sorted(there)) or "none"
                yield f"{kind} {feature.name!r} is described, the program's {kind}s are {names}"
    if not interface.outputs:
        yield "no output is described"
    described = {feature.name: feature for feature in (*interface.inputs, *interface.states)}
    for variable in function.inputs:
        if variable.name not in described:
            yield f"input {variable.name!r} is not described"
        elif isinstance(variable.type, TensorType):
            yield from _other_shape(described[variable.name], variable.type)


def _other_shape(feature: Feature, kind: TensorType) -> Iterator[str]:
    """An input that is described with other sizes than the program takes, where it does not take several."""
    if feature.shape and None not in kind.shape and feature.shape != kind.shape:
        yield f"input {feature.name!r} is described as {feature.shape}, the program takes {kind.shape}"
    elif any(size < 1 for size in feature.shape):
        yield f"input {feature.name!r} is described as {feature.shape}, expected sizes of 1 and more"
