"""MIL ops as plain functions: the signature is the schema.

``@mil_op("gelu")`` / ``def gelu(x: Tensor, mode: str = "EXACT") -> Tensor``: a parameter's name is MIL's, its
default is MIL's default, and its annotation says how an operand is given:

    Tensor                   a tensor (a constant: a buffer)
    Sequence[Tensor]         the tensors of a tuple operand
    np.ndarray               a constant in its stored element type (compressed weights)
    int, float, bool, str, Sequence[...]   a constant, as Python value
    Literal["a", "b"]        a constant string of these; a program with another one is refused before it runs
    Ints                     a constant as Python value, or a tensor where it is known only when the program runs
    torch.dtype              not an operand: the element type of the first output in this run

Adding ``| None`` makes no difference but to the default. Arithmetic is the run's: float tensors all have one type
(float32 unless asked otherwise), whatever MIL declares; int32 stays int32; unsigned types wider than 8 bits are
held in the next wider signed type. A parameter value that a function does not know raises UnsupportedError.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError

Ints = Sequence[int] | Tensor
MAX_ELEMENTS = 1 << 29


class Kind(enum.Enum):
    """How an operand is given to an op's function."""

    TENSOR = enum.auto()
    TENSORS = enum.auto()
    ARRAY = enum.auto()
    CONSTANT = enum.auto()
    CONSTANT_OR_TENSOR = enum.auto()
    OUTPUT_DTYPE = enum.auto()


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    kind: Kind
    required: bool
    choices: tuple[str, ...] = ()

    @property
    def is_filled_in(self) -> bool:
        """Given by the one who runs the op, not by an operand."""
        return self.kind is Kind.OUTPUT_DTYPE


@dataclass(frozen=True, slots=True)
class Op:
    """``several``: the function returns a tuple, one tensor for each output. ``packed``: a compressed weight, which
    works on stored arrays and not on tensors."""

    name: str
    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    several: bool

    @property
    def packed(self) -> bool:
        return self.name.startswith("constexpr_")


OPS: dict[str, Op] = {}

Function = typing.TypeVar("Function", bound=Callable[..., Any])


def mil_op(name: str) -> Callable[[Function], Function]:
    """Register a function as the meaning of a MIL op. Raises ValueError for a second function of the same name."""

    def register(function: Function) -> Function:
        if name in OPS:
            raise ValueError(f"MIL op {name!r} is defined twice: {OPS[name].function} and {function}")
        hints = typing.get_type_hints(function)
        parameters = {
            parameter.name: Parameter(
                parameter.name,
                _kind(hints[parameter.name]),
                parameter.default is inspect.Parameter.empty,
                _choices(hints[parameter.name]),
            )
            for parameter in inspect.signature(function).parameters.values()
        }
        OPS[name] = Op(name, function, parameters, several=typing.get_origin(hints["return"]) is tuple)
        return function

    return register


def ints(values: Ints) -> list[int]:
    """Shape-like operands as a list of Python integers."""
    return [int(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]


def check_count(op: str, count: float) -> None:
    """Raise UnsupportedError where operands, which may be known only in the run, ask for more elements than one
    such op makes in any model of this kind."""
    if not count <= MAX_ELEMENTS:
        raise UnsupportedError(f"{op}: {count:.3g} elements, expected at most {MAX_ELEMENTS}")


def positive(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis + rank if axis < 0 else axis


_KINDS: Mapping[Any, Kind] = {
    torch.dtype: Kind.OUTPUT_DTYPE,
    Tensor: Kind.TENSOR,
    Sequence[Tensor]: Kind.TENSORS,
    np.ndarray: Kind.ARRAY,
}


def _kind(hint: Any) -> Kind:
    first, *others = members = _members(hint)
    if first in _KINDS and not others:
        return _KINDS[first]
    return Kind.CONSTANT_OR_TENSOR if Tensor in members else Kind.CONSTANT


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(
        choice
        for member in _members(hint)
        if typing.get_origin(member) is typing.Literal
        for choice in typing.get_args(member)
    )


def _members(hint: Any) -> set[Any]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return (set(typing.get_args(hint)) if union else {hint}) - {type(None)}
