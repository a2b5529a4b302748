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


@mil_op("sin")
def sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@mil_op("sqrt")
def sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x)


@mil_op("square")
def square(x: Tensor) -> Tensor:
    return x * x


@mil_op("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@mil_op("equal")
def equal(x: Tensor, y: Tensor) -> Tensor:
    return x == y


@mil_op("greater")
def greater(x: Tensor, y: Tensor) -> Tensor:
    return x > y


@mil_op("mul")
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


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


@mil_op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


@mil_op("cast")
def cast(x: Tensor, dtype: Castable, out_dtype: torch.dtype) -> Tensor:
    """Towards integers the fraction is dropped; towards any float type the run's own is taken, without rounding."""
    return x.to(out_dtype)
