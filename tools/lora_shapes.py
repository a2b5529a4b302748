"""A LoRA of the shapes checkpoint's UNet: trained as changes of its weights, written as peft writes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

RANK = 8
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2", "time_emb_proj"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)


class LowRank(nn.Module):
    """A weight plus a product of two small matrices, which starts at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        inputs = math.prod(weight.shape[1:])
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def adapt(unet: nn.Module) -> dict[str, LowRank]:
    """Freeze a network and put a LowRank on the weights of the usual layers, and give them by the layers' names."""
    unet.requires_grad_(False)
    found = {}
    for name, layer in unet.named_modules():
        if name.endswith(TARGETS) and isinstance(layer, nn.Linear | nn.Conv2d):
            found[name] = LowRank(layer.weight, RANK)
    for name, change in found.items():
        parametrize.register_parametrization(unet.get_submodule(name), "weight", change)
    return found


def lora_tensors(unet: nn.Module, changes: dict[str, LowRank]) -> dict[str, Tensor]:
    """The changes as peft names and shapes them, in float16: lora_B @ lora_A is added to the weight."""
    tensors = {}
    for name, change in changes.items():
        weight = unet.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        shape = weight.shape
        down, up = change.down.detach().half(), change.up.detach().half()
        tensors[f"{name}.lora_A.weight"] = down.view(RANK, *shape[1:]).contiguous()
        tensors[f"{name}.lora_B.weight"] = up.view(*up.shape, *(1 for _ in shape[2:])).contiguous()
    return tensors
