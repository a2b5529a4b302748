"""LayerNorm over the channels of (batch, channels, 1, length), as one operation in the program.

torch normalises trailing axes only; MIL's ``layer_norm`` takes any, and over axis 1 of this layout it is what
coremltools itself makes of the channels-first LayerNorm of Apple's ml-ane-transformers (coremltools#1972). Written
out in torch it would be nine operations, or two transposes around each norm. So it is an operation of our own, and
`teach_coremltools` says what it is in MIL.
"""

# Without `from __future__ import annotations`: torch.library makes the operator's schema of the annotations.

from typing import Any

import torch
from torch import nn

from diffusion_runtime.coremltools_import import import_coremltools

NAME = "diffusion_convert::channel_norm"


@torch.library.custom_op(NAME, mutates_args=())
def channel_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) · weight + bias, mean and variance over axis 1 of a rank-4 tensor."""
    last = nn.functional.layer_norm(x.transpose(1, 3), (x.shape[1],), weight, bias, epsilon)
    # torch forbids custom operators to return a view of what they were given.
    return last.transpose(1, 3).contiguous()


@channel_norm.register_fake
def _same_shape(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    del weight, bias, epsilon
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class ChannelNorm(nn.Module):
    """nn.LayerNorm's parameters, by its names, over (batch, channels, 1, length)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.epsilon = norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = channel_norm(x, self.weight, self.bias, self.epsilon)
        return normed


def teach_coremltools() -> None:
    """Make ``ct.convert`` translate `channel_norm`; calling it again changes nothing."""
    builder = import_coremltools("converters.mil").Builder
    torch_frontend = import_coremltools("converters.mil.frontend.torch.torch_op_registry")
    operands = import_coremltools("converters.mil.frontend.torch.ops")._get_inputs

    def channel_norm(context: Any, node: Any) -> None:
        x, weight, bias, epsilon = operands(context, node, expected=4)
        context.add(builder.layer_norm(x=x, axes=[1], gamma=weight, beta=bias, epsilon=epsilon, name=node.name))

    torch_frontend.register_torch_op(channel_norm, torch_alias=[NAME], override=True)
