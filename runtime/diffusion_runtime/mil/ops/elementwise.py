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


@mil_op("acos")
def acos(x: Tensor) -> Tensor:
    return torch.acos(x)


@mil_op("asin")
def asin(x: Tensor) -> Tensor:
    return torch.asin(x)


@mil_op("atan")
def atan(x: Tensor) -> Tensor:
    return torch.atan(x)


@mil_op("atanh")
def atanh(x: Tensor) -> Tensor:
    return torch.atanh(x)


@mil_op("ceil")
def ceil(x: Tensor) -> Tensor:
    return torch.ceil(x)


@mil_op("cos")
def cos(x: Tensor) -> Tensor:
    return torch.cos(x)


@mil_op("cosh")
def cosh(x: Tensor) -> Tensor:
    return torch.cosh(x)


@mil_op("erf")
def erf(x: Tensor) -> Tensor:
    return torch.erf(x)


@mil_op("exp")
def exp(x: Tensor) -> Tensor:
    return torch.exp(x)


@mil_op("exp2")
def exp2(x: Tensor) -> Tensor:
    return torch.exp2(x)


@mil_op("floor")
def floor(x: Tensor) -> Tensor:
    return torch.floor(x)


@mil_op("identity")
def identity(x: Tensor) -> Tensor:
    return x


@mil_op("logical_not")
def logical_not(x: Tensor) -> Tensor:
    return torch.logical_not(x)


@mil_op("round")
def round_(x: Tensor) -> Tensor:
    return torch.round(x)


@mil_op("sign")
def sign(x: Tensor) -> Tensor:
    return torch.sign(x)


@mil_op("sin")
def sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@mil_op("sinh")
def sinh(x: Tensor) -> Tensor:
    return torch.sinh(x)


@mil_op("sqrt")
def sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x)


@mil_op("square")
def square(x: Tensor) -> Tensor:
    return x * x


@mil_op("tan")
def tan(x: Tensor) -> Tensor:
    return torch.tan(x)


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


@mil_op("logical_xor")
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_xor(x, y)


@mil_op("maximum")
def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@mil_op("minimum")
def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


@mil_op("mod")
def mod(x: Tensor, y: Tensor) -> Tensor:
    return torch.remainder(x, y)


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


@mil_op("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@mil_op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@mil_op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


@mil_op("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    return torch.clamp(x, min=alpha)


@mil_op("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


@mil_op("cast")
def cast(x: Tensor, dtype: Castable, out_dtype: torch.dtype) -> Tensor:
    """Towards integers the fraction is dropped; towards any float type the run's own is taken, without rounding."""
    return x.to(out_dtype)


@mil_op("quantize")
def quantize(
    input: Tensor,  # MIL's name
    scale: Tensor,
    output_dtype: Literal["int8", "uint8"],
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point)."""
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    quotient = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        quotient = quotient + _along(zero_point, input, axis)
    return quotient.clamp(low, high).to(out_dtype)


@mil_op("dequantize")
def dequantize(
    input: Tensor,  # MIL's name
    scale: Tensor,
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """scale * (input - zero_point)."""
    shifted = input.to(out_dtype)
    if zero_point is not None:
        shifted = shifted - _along(zero_point, input, axis).to(out_dtype)
    return shifted * _along(scale, input, axis)


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A vector of one number per index of ``axis``, shaped to broadcast against ``x``; a scalar as it is."""
    if parameter.ndim == 0 or axis is None:
        return parameter
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)
