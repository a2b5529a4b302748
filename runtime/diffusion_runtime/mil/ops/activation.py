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


@mil_op("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@mil_op("silu")
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@mil_op("gelu")
def gelu(x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate=_GELU[mode])


@mil_op("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)
