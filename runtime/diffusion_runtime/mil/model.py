"""A whole ML Program model: its program, and the description that Core ML shows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusion_runtime.mil import description
from diffusion_runtime.mil.program import Function, FunctionInterface, Metadata, Program


@dataclass(frozen=True, slots=True)
class Model:
    """What ``model.mlmodel`` says.

    ``description`` is the serialised ModelDescription, kept byte for byte: it may say more than is parsed here, and
    the compiled format carries it verbatim. ``interfaces``, ``metadata`` and ``default_function`` ("" where the
    description declares no functions) are read from it; to change them, replace ``description`` by what
    ``description.serialize`` makes of them. Raises PackageError where the description is damaged or declares
    nothing that the program has.
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
