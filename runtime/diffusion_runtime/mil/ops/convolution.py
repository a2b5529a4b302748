"""Convolution and its transpose, with one to three spatial dimensions: x is (batch, channels, *spatial)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import mil_op

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
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
    spatial = _spatial("conv", x)
    strides, dilations = strides or [1] * spatial, dilations or [1] * spatial
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]
    pads = paddings(pad_type, pad, x.shape[2:], reach, strides)
    even = all(before == after for before, after in pads)
    if not even:
        x = F.pad(x, [size for pair in reversed(pads) for size in pair])
    padding = [before if even else 0 for before, _ in pads]
    return _CONV[spatial](x, weight, bias, strides, padding, dilations, groups)


@mil_op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pad_type: Literal["valid", "custom", "same"] = "valid",
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """``weight`` is (channels in, channels out / groups, *kernel).

    The whole transposed convolution is cut by ``pad`` before and after each dimension, or for ``same`` to
    ``strides`` times the input's size; ``output_shape`` says how much to keep: where that is more, zeros follow.
    """
    spatial = _spatial("conv_transpose", x)
    strides, dilations = strides or [1] * spatial, dilations or [1] * spatial
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]
    whole = [(size - 1) * stride + k for size, stride, k in zip(x.shape[2:], strides, reach, strict=True)]
    if pad_type == "same":
        kept = (
            list(output_shape[2:]) if output_shape else [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        )
        starts = [max(size - keep, 0) // 2 for size, keep in zip(whole, kept, strict=True)]
    else:
        cuts = list(pad or [0] * 2 * spatial) if pad_type == "custom" else [0] * 2 * spatial
        starts = cuts[::2]
        rest = [size - before - after for size, before, after in zip(whole, starts, cuts[1::2], strict=True)]
        kept = list(output_shape[2:]) if output_shape else rest
    y = _CONV_TRANSPOSE[spatial](x, weight, None, strides, 0, 0, groups, dilations)
    for axis, (start, keep) in enumerate(zip(starts, kept, strict=True), start=2):
        y = y.narrow(axis, start, min(keep, y.shape[axis] - start))
    missing = [keep - size for keep, size in zip(kept, y.shape[2:], strict=True)]
    if any(missing):
        y = F.pad(y, [size for count in reversed(missing) for size in (0, count)])
    return y if bias is None else y + bias.reshape(-1, *[1] * spatial)


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


def _spatial(op: str, x: Tensor) -> int:
    spatial = x.ndim - 2
    if spatial not in _CONV:
        raise UnsupportedError(f"{op}: of rank {x.ndim} is not covered; known: ranks 3 to 5")
    return spatial
