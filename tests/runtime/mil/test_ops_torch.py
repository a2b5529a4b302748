"""The MIL ops that coremltools does not evaluate: against torch, or against their definition written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffusion_runtime.mil.ops.registry import OPS

torch.manual_seed(0)
X = torch.randn(2, 4, 9, 7)
LINE = torch.randn(2, 4, 9)
VOLUME = torch.randn(1, 2, 5, 6, 7)
W = torch.randn(6, 4, 3, 2)
DOWN = torch.randn(4, 3, 3, 2)
BIAS = torch.randn(6)
CHANNEL = torch.randn(4)
SCALE = torch.rand(4) + 0.5
Expected = Callable[[], Any]


def same_pad(x: torch.Tensor, kernel: tuple[int, ...], strides: tuple[int, ...], lower: bool) -> torch.Tensor:
    """TensorFlow's SAME: ceil(size / stride) outputs, an odd element behind, or before where ``lower``."""
    pads: list[int] = []
    for size, k, stride in zip(reversed(x.shape[2:]), reversed(kernel), reversed(strides), strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + k - size)
        less, more = total // 2, total - total // 2
        pads += [more, less] if lower else [less, more]
    return F.pad(x, pads)


def torch_lstm(bidirectional: bool, backwards: bool = False) -> tuple[dict[str, Any], tuple[torch.Tensor, ...]]:
    """MIL operands (gates input, forget, output, cell) and results of torch's (input, forget, cell, output)."""
    layer = torch.nn.LSTM(3, 5, bidirectional=bidirectional)
    x, h, c = torch.randn(6, 2, 3), torch.randn(1 + bidirectional, 2, 5), torch.randn(1 + bidirectional, 2, 5)
    arguments: dict[str, Any] = {
        "x": x,
        "initial_h": h.permute(1, 0, 2).flatten(1),
        "initial_c": c.permute(1, 0, 2).flatten(1),
    }
    for suffix, back in (("", ""), ("_reverse", "_back"))[: 1 + bidirectional]:
        gates = {
            name: getattr(layer, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        order = {name: torch.cat([item.chunk(4)[gate] for gate in (0, 1, 3, 2)]) for name, item in gates.items()}
        arguments |= {f"weight_ih{back}": order["weight_ih"], f"weight_hh{back}": order["weight_hh"]}
        arguments[f"bias{back}"] = order["bias_ih"] + order["bias_hh"]
    output, (hidden, memory) = layer(x.flip(0) if backwards else x, (h, c))
    output = output.flip(0) if backwards else output
    return arguments, (output, hidden.permute(1, 0, 2).flatten(1), memory.permute(1, 0, 2).flatten(1))


ROWS: list[tuple[str, dict[str, Any], Expected]] = [
    ("silu", {"x": X}, lambda: X * torch.sigmoid(X)),
    ("conv", {"x": X, "weight": W}, lambda: F.conv2d(X, W)),
    (
        "conv",
        {
            "x": X,
            "weight": W,
            "bias": BIAS,
            "strides": [2, 1],
            "pad_type": "custom",
            "pad": [1, 1, 2, 2],
            "dilations": [1, 2],
        },
        lambda: F.conv2d(X, W, BIAS, (2, 1), (1, 2), (1, 2)),
    ),
    (
        "conv",
        {"x": X, "weight": W, "pad_type": "custom", "pad": [0, 1, 2, 0]},
        lambda: F.conv2d(F.pad(X, (2, 0, 0, 1)), W),
    ),
    ("conv", {"x": X, "weight": W[:, :2], "groups": 2}, lambda: F.conv2d(X, W[:, :2], groups=2)),
    *(
        (
            "conv",
            {"x": X, "weight": W, "pad_type": pad_type, "strides": [2, 2]},
            lambda lower=pad_type == "same_lower": F.conv2d(same_pad(X, (3, 2), (2, 2), lower), W, stride=2),
        )
        for pad_type in ("same", "same_lower")
    ),
    (
        "conv",
        {"x": LINE, "weight": W[..., 0], "pad_type": "custom", "pad": [1, 1]},
        lambda: F.conv1d(LINE, W[..., 0], padding=1),
    ),
    (
        "conv",
        {"x": VOLUME, "weight": torch.ones(3, 2, 2, 2, 2)},
        lambda: F.conv3d(VOLUME, torch.ones(3, 2, 2, 2, 2)),
    ),
    (
        "conv_transpose",
        {"x": X, "weight": DOWN, "bias": BIAS[:3], "strides": [2, 3]},
        lambda: F.conv_transpose2d(X, DOWN, BIAS[:3], (2, 3)),
    ),
    (
        "conv_transpose",
        {"x": X, "weight": DOWN, "pad_type": "custom", "pad": [1, 1, 0, 0], "strides": [2, 2], "dilations": [2, 1]},
        lambda: F.conv_transpose2d(X, DOWN, None, 2, (1, 0), dilation=(2, 1)),
    ),
    (
        "conv_transpose",
        {
            "x": X,
            "weight": DOWN,
            "bias": BIAS[:3],
            "pad_type": "custom",
            "pad": [1, 1, 0, 0],
            "strides": [2, 2],
            "output_shape": [2, 3, 18, 15],
        },
        lambda: F.conv_transpose2d(X, DOWN, BIAS[:3], 2, (1, 0), (1, 1)),
    ),
    (
        "conv_transpose",
        {"x": X, "weight": DOWN, "pad_type": "custom", "pad": [1, 0, 0, 1]},
        lambda: F.conv_transpose2d(X, DOWN)[:, :, 1:, :-1],
    ),
    (
        "conv_transpose",
        {"x": X, "weight": DOWN, "pad_type": "same", "strides": [2, 2]},
        lambda: F.conv_transpose2d(X, DOWN, None, 2)[:, :, :18, :14],
    ),
    (
        "conv_transpose",
        {"x": X, "weight": DOWN[:, :, :2], "groups": 2},
        lambda: F.conv_transpose2d(X, DOWN[:, :, :2], groups=2),
    ),
    (
        "max_pool",
        {"x": X, "kernel_sizes": [3, 2], "pad_type": "custom", "pad": [1, 1, 0, 0], "strides": [2, 2]},
        lambda: F.max_pool2d(X, (3, 2), 2, (1, 0)),
    ),
    (
        "max_pool",
        {
            "x": X,
            "kernel_sizes": [3, 3],
            "pad_type": "custom",
            "pad": [1, 1, 1, 1],
            "strides": [3, 3],
            "ceil_mode": True,
        },
        lambda: F.max_pool2d(X, 3, 3, 1, ceil_mode=True),
    ),
    ("max_pool", {"x": LINE, "kernel_sizes": [3], "pad_type": "valid"}, lambda: F.max_pool1d(LINE, 3, 1)),
    (
        "max_pool",
        {"x": X - 9, "kernel_sizes": [2, 2], "pad_type": "same", "strides": [2, 2]},
        lambda: F.max_pool2d(F.pad(X - 9, (0, 1, 0, 1), value=-99), 2),
    ),
    (
        "avg_pool",
        {"x": X, "kernel_sizes": [2, 2], "pad_type": "valid", "strides": [2, 1]},
        lambda: F.avg_pool2d(X, 2, (2, 1)),
    ),
    *(
        (
            "avg_pool",
            {
                "x": X,
                "kernel_sizes": [3, 3],
                "pad_type": "custom",
                "pad": [1, 1, 1, 1],
                "strides": [2, 2],
                "exclude_padding_from_average": exclude,
                "ceil_mode": ceil,
            },
            lambda exclude=exclude, ceil=ceil: F.avg_pool2d(X, 3, 2, 1, ceil, not exclude),
        )
        for exclude in (False, True)
        for ceil in (False, True)
    ),
    (
        "batch_norm",
        {"x": X, "mean": CHANNEL, "variance": SCALE, "gamma": SCALE, "beta": CHANNEL, "epsilon": 0.1},
        lambda: F.batch_norm(X, CHANNEL, SCALE, SCALE, CHANNEL, eps=0.1),
    ),
    (
        "instance_norm",
        {"x": X, "gamma": SCALE, "beta": CHANNEL},
        lambda: F.instance_norm(X, weight=SCALE, bias=CHANNEL),
    ),
    ("instance_norm", {"x": torch.ones(1, 4, 1, 1), "beta": CHANNEL}, lambda: CHANNEL.reshape(1, 4, 1, 1)),
    ("gather_nd", {"x": X, "indices": torch.tensor([[[0, 1], [1, -1]]])}, lambda: X[[0, 1], [1, 3]][None]),
    (
        "gather_nd",
        {"x": X, "indices": torch.tensor([[[2, 1]], [[0, 3]]]), "batch_dims": 1},
        lambda: torch.stack([X[0, 2, 1], X[1, 0, 3]])[:, None],
    ),
    (
        "upsample_nearest_neighbor",
        {"x": X, "scale_factor_height": 2, "scale_factor_width": 3},
        lambda: X.repeat_interleave(2, 2).repeat_interleave(3, 3),
    ),
    *(
        (
            "upsample_bilinear",
            {"x": X, "scale_factor_height": 2, "scale_factor_width": 1.5, "align_corners": align},
            lambda align=align: F.interpolate(X, (18, 10), mode="bilinear", align_corners=align),
        )
        for align in (True, False)
    ),
    ("concat", {"values": [torch.tensor(1), torch.tensor(2)], "axis": 0}, lambda: torch.tensor([1, 2])),
    (
        "concat",
        {"values": [X, X + 1], "axis": 1, "interleave": True},
        lambda: torch.stack([X, X + 1], 2).reshape(2, 8, 9, 7),
    ),
]


@pytest.mark.parametrize(
    ("op", "arguments", "expected"), ROWS, ids=[f"{index}-{row[0]}" for index, row in enumerate(ROWS)]
)
def test_op_computes_its_definition(op: str, arguments: dict[str, Any], expected: Expected) -> None:
    result, wanted = OPS[op].function(**arguments), expected()
    assert result.shape == wanted.shape
    assert result.dtype == wanted.dtype
    torch.testing.assert_close(result, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_dims", [True, False])
@pytest.mark.parametrize("axes", [[2, 3, 4], [-3, -2, -1], [4, 2], [0, 2], [1], None])
def test_means_of_groups_whose_channels_lie_last(
    axes: list[int] | None, keep_dims: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 8, 5, 3).to(dtype).contiguous(memory_format=torch.channels_last).view(2, 2, 4, 5, 3)
    found = OPS["reduce_mean"].function(x, axes, keep_dims)
    expected = x.double().mean(axes or [0, 1, 2, 3, 4], keep_dims).to(dtype)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("output_sequence", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm_computes_what_torch_computes(direction: str, output_sequence: bool) -> None:
    arguments, (output, hidden, memory) = torch_lstm(direction == "bidirectional", direction == "reverse")
    sequence, last, cell = OPS["lstm"].function(**arguments, direction=direction, output_sequence=output_sequence)
    torch.testing.assert_close(sequence, output if output_sequence else hidden[None])
    torch.testing.assert_close(last, hidden)
    torch.testing.assert_close(cell, memory)
