"""Normalisations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.mil.ops.registry import mil_op, positive


@mil_op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@mil_op("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Sequence[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Over ``axes`` (none given: all); ``gamma`` and ``beta`` have the shape of these axes, in ascending order."""
    over = sorted(positive(axis, x.ndim) for axis in (range(x.ndim) if axes is None else axes))
    rest = [axis for axis in range(x.ndim) if axis not in over]
    order = rest + over
    normal = F.layer_norm(x.permute(order), [x.shape[axis] for axis in over], gamma, beta, epsilon)
    return normal.permute([order.index(axis) for axis in range(x.ndim)])


@mil_op("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)
