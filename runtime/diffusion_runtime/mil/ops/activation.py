"""Activations. ``alpha`` and ``beta`` are MIL's names."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.mil.ops.registry import mil_op

_GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}


@mil_op("relu")
def relu(x: Tensor) -> Tensor:
    return F.relu(x)


@mil_op("relu6")
def relu6(x: Tensor) -> Tensor:
    return F.relu6(x)


@mil_op("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@mil_op("silu")
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@mil_op("softplus")
def softplus(x: Tensor) -> Tensor:
    return F.softplus(x)


@mil_op("softsign")
def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


@mil_op("gelu")
def gelu(x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate=_GELU[mode])


@mil_op("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@mil_op("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return F.leaky_relu(x, alpha).clamp(max=beta)


@mil_op("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


@mil_op("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return F.leaky_relu(x, alpha)


@mil_op("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x * alpha + beta


@mil_op("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, alpha)


@mil_op("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@mil_op("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (x * alpha + beta).clamp(0, 1)


@mil_op("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    return alpha.reshape(shape) * F.softplus(x * beta.reshape(shape))


@mil_op("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))
