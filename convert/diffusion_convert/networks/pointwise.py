"""Linear layers as 1x1 convolutions over (batch, channels, 1, length)."""

from __future__ import annotations

import torch
from torch import nn

from diffusion_runtime.errors import UnsupportedError


def pointwise(layer: nn.Module) -> nn.Conv2d:
    """A 1x1 convolution with the parameters of an nn.Linear or of a 1x1 nn.Conv2d; no value is copied or changed.

    Raises UnsupportedError for anything else: a LoRA that was not fused, a quantized layer."""
    if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
        raise UnsupportedError(
            f"{type(layer).__name__} in place of a linear layer: expected Linear or a 1x1 Conv2d; "
            "fuse LoRAs and remove quantization first"
        )
    out_channels, in_channels = layer.weight.shape[:2]
    with torch.device("meta"):
        convolution = nn.Conv2d(in_channels, out_channels, 1, bias=layer.bias is not None)
    convolution.weight = _frozen(layer.weight.detach().reshape(out_channels, in_channels, 1, 1))
    if layer.bias is not None:
        convolution.bias = _frozen(layer.bias.detach())
    return convolution


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
