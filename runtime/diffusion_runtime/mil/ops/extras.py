"""Ops that none of our packages holds: those that other converters put into packages of Stable Diffusion, and
``lstm``, with which Apple's compiler was observed (`compile`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.convolution import spatial_rank
from diffusion_runtime.mil.ops.elementwise import ops_of_one, ops_of_two
from diffusion_runtime.mil.ops.registry import Ints, check_count, ints, mil_op, positive

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
ops_of_one(
    {
        "erf": torch.erf,
        "exp": torch.exp,
        "floor": torch.floor,
        "identity": lambda x: x,
        "tanh": torch.tanh,
    }
)
ops_of_two(
    {
        "floor_div": torch.floor_divide,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "not_equal": torch.ne,
    }
)


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
    spatial = spatial_rank("conv_transpose", x)
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


@mil_op("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


@mil_op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@mil_op("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


@mil_op("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last dimension of ``indices`` holds coordinates in the dimensions of ``x`` behind ``batch_dims``."""
    index = indices.long()
    batch = x.shape[:batch_dims]
    rank = index.ndim - 1
    leading = [
        torch.arange(size, device=x.device).reshape(*[1] * axis, -1, *[1] * (rank - axis - 1))
        for axis, size in enumerate(batch)
    ]
    return x[(*leading, *index.unbind(-1))]


@mil_op("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zero outside of ``lower`` sub-diagonals and ``upper`` super-diagonals; negative: all are kept."""
    rows = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
    columns = torch.arange(x.shape[-1], device=x.device)
    kept = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    if lower >= 0:
        kept &= rows - columns <= lower
    if upper >= 0:
        kept &= columns - rows <= upper
    return torch.where(kept, x, torch.zeros_like(x))


@mil_op("fill")
def fill(shape: Ints, out_dtype: torch.dtype, value: float = 0.0) -> Tensor:
    device = shape.device if isinstance(shape, Tensor) else None
    check_count("fill", math.prod(ints(shape)))
    return torch.full(ints(shape), value, dtype=out_dtype, device=device)


@mil_op("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Over the spatial dimensions of (batch, channels, *spatial)."""
    return torch.group_norm(x, x.shape[1], gamma, beta, epsilon)


@mil_op("stack")
def stack(values: Sequence[Tensor], axis: int) -> Tensor:
    return torch.stack(list(values), axis)


@mil_op("slice_by_size")
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """``size`` -1 takes all from ``begin`` on."""
    for axis, (first, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start = positive(first, x.shape[axis])
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@mil_op("shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32, device=x.device if x.device.type != "meta" else None)


@mil_op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    output_sequence: bool = False,
    recurrent_activation: Literal["sigmoid"] = "sigmoid",
    cell_activation: Literal["tanh"] = "tanh",
    activation: Literal["tanh"] = "tanh",
) -> tuple[Tensor, ...]:
    """Outputs (sequence or 1, batch, hidden), last hidden and last cell state (batch, hidden); of two directions
    side by side. The activations are those of torch's LSTM: no other is covered."""
    ways = [(weight_ih, weight_hh, bias)]
    if direction == "bidirectional":
        if weight_ih_back is None or weight_hh_back is None:
            raise UnsupportedError("lstm: bidirectional without weights for the way back is not covered")
        ways.append((weight_ih_back, weight_hh_back, bias_back))
    weights = []
    for of_input, of_hidden, added in ways:
        weights += [_gates_as_torch(of_input), _gates_as_torch(of_hidden)]
        weights += [torch.zeros_like(of_input[:, 0]) if added is None else _gates_as_torch(added)]
        weights += [torch.zeros_like(of_input[:, 0])]  # torch has two biases, which it adds up
    states = [state.reshape(len(state), len(ways), -1).transpose(0, 1) for state in (initial_h, initial_c)]
    steps = x.flip(0) if direction == "reverse" else x
    sequence, hidden, cell = torch.lstm(steps, states, weights, True, 1, 0.0, False, len(ways) > 1, False)
    hidden, cell = (state.transpose(0, 1).flatten(1) for state in (hidden, cell))
    if not output_sequence:
        return hidden[None], hidden, cell
    return sequence.flip(0) if direction == "reverse" else sequence, hidden, cell


def _gates_as_torch(weight: Tensor) -> Tensor:
    """MIL has the input, forget, output and cell gate, torch the cell gate before the output's."""
    i, f, o, c = weight.chunk(4)
    return torch.cat([i, f, c, o])
