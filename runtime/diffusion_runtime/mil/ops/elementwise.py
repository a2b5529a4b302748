"""Elementwise arithmetic, comparisons, logic, activations and casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import mil_op

Castable = Literal[
    "fp16", "fp32", "fp64", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"
]
_GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}


def ops_of_one(functions: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Register functions of one tensor as the MIL ops of these names: MIL calls the tensor ``x``."""
    for name, function in functions.items():
        mil_op(name)(_of_one(name, function))


def ops_of_two(functions: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
    """The same of functions of two tensors, ``x`` and ``y``."""
    for name, function in functions.items():
        mil_op(name)(_of_two(name, function))


def _of_one(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        return function(x)

    # torch.fx writes a call by the function's name, and takes no two functions of one name.
    compute.__name__ = name
    return compute


def _of_two(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    compute.__name__ = name
    return compute


ops_of_one(
    {
        "abs": torch.abs,
        "cos": torch.cos,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "sin": torch.sin,
        "sqrt": torch.sqrt,
        "square": torch.square,
    }
)
ops_of_two(
    {
        "add": torch.add,
        "equal": torch.eq,
        "greater": torch.gt,
        "mul": torch.mul,
        "pow": torch.pow,
        "sub": torch.sub,
    }
)


@mil_op("gelu")
def gelu(x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate=_GELU[mode])


@mil_op("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise UnsupportedError("real_div: of integers is not covered (its rounding is not documented)")
    return x / y


@mil_op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


@mil_op("cast")
def cast(x: Tensor, dtype: Castable, out_dtype: torch.dtype) -> Tensor:
    """Towards integers the fraction is dropped; towards any float type the run's own is taken, without rounding."""
    return x.to(out_dtype)
