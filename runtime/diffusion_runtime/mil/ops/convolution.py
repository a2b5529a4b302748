"""Convolution with one to three spatial dimensions: x is (batch, channels, *spatial)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import mil_op

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PadType = Literal["valid", "custom", "same", "same_lower"]


@mil_op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Sequence[int] | None = None,
    pad_type: PadType = "valid",
    pad: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """``weight`` is (channels out, channels in / groups, *kernel)."""
    spatial = spatial_rank("conv", x)
    strides, dilations = strides or [1] * spatial, dilations or [1] * spatial
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]
    pads = paddings(pad_type, pad, x.shape[2:], reach, strides)
    even = all(before == after for before, after in pads)
    if not even:
        x = F.pad(x, [size for pair in reversed(pads) for size in pair])
    padding = [before if even else 0 for before, _ in pads]
    return _CONV[spatial](x, weight, bias, strides, padding, dilations, groups)


def paddings(
    pad_type: PadType,
    pad: Sequence[int] | None,
    sizes: Sequence[int],
    reach: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int]]:
    """Elements added before and after each spatial dimension; ``reach`` is the extent of the (dilated) kernel.

    ``same`` keeps ceil(size / stride) outputs and puts an odd element after, ``same_lower`` before.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        pad = pad or [0] * 2 * len(sizes)
        return [(pad[2 * axis], pad[2 * axis + 1]) for axis in range(len(sizes))]
    pairs = []
    for size, k, stride in zip(sizes, reach, strides, strict=True):
        total = max(0, stride * -(-size // stride) - size + k - stride)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if pad_type == "same" else (more, less))
    return pairs


def spatial_rank(op: str, x: Tensor) -> int:
    spatial = x.ndim - 2
    if spatial not in _CONV:
        raise UnsupportedError(f"{op}: of rank {x.ndim} is not covered; known: ranks 3 to 5")
    return spatial
