"""Elementwise arithmetic, comparisons, logic and casts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import mil_op

Castable = Literal[
    "fp16", "fp32", "fp64", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"
]


@mil_op("abs")
def abs_(x: Tensor) -> Tensor:
    return torch.abs(x)


@mil_op("cos")
def cos(x: Tensor) -> Tensor:
    return torch.cos(x)


@mil_op("erf")
def erf(x: Tensor) -> Tensor:
    return torch.erf(x)


@mil_op("exp")
def exp(x: Tensor) -> Tensor:
    return torch.exp(x)


@mil_op("floor")
def floor(x: Tensor) -> Tensor:
    return torch.floor(x)


@mil_op("identity")
def identity(x: Tensor) -> Tensor:
    return x


@mil_op("logical_not")
def logical_not(x: Tensor) -> Tensor:
    return torch.logical_not(x)


@mil_op("sin")
def sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@mil_op("sqrt")
def sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x)


@mil_op("square")
def square(x: Tensor) -> Tensor:
    return x * x


@mil_op("tanh")
def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@mil_op("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@mil_op("equal")
def equal(x: Tensor, y: Tensor) -> Tensor:
    return x == y


@mil_op("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.floor_divide(x, y)


@mil_op("greater")
def greater(x: Tensor, y: Tensor) -> Tensor:
    return x > y


@mil_op("greater_equal")
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    return x >= y


@mil_op("less")
def less(x: Tensor, y: Tensor) -> Tensor:
    return x < y


@mil_op("less_equal")
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    return x <= y


@mil_op("logical_and")
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_and(x, y)


@mil_op("logical_or")
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_or(x, y)


@mil_op("maximum")
def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@mil_op("minimum")
def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


@mil_op("mul")
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@mil_op("not_equal")
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    return x != y


@mil_op("pow")
def pow_(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y)


@mil_op("sub")
def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


@mil_op("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise UnsupportedError("real_div: of integers is not covered (its rounding is not documented)")
    return x / y


@mil_op("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


@mil_op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@mil_op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


@mil_op("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


@mil_op("cast")
def cast(x: Tensor, dtype: Castable, out_dtype: torch.dtype) -> Tensor:
    """Towards integers the fraction is dropped; towards any float type the run's own is taken, without rounding."""
    return x.to(out_dtype)
