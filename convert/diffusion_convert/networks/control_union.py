"""What is particular to diffusers' ControlNetUnionModel: torch's own attention among a picture and the latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class SequenceAttention(nn.Module):
    """torch's MultiheadAttention of a sequence (length, batch, width) to itself, in plain operations."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        length, batch, width = (int(size) for size in query.shape)
        mixed = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (
            part.reshape(length, batch * self.heads, width // self.heads).transpose(0, 1)
            for part in torch.split(mixed, width, dim=2)
        )
        scores = torch.softmax(q @ k.transpose(1, 2) * (width // self.heads) ** -0.5, dim=2)
        joined = (scores @ v).transpose(0, 1).reshape(length, batch, width)
        return self.out_proj(joined), None


def put_sequence_attention(network: Any) -> None:
    """Replace the attentions of a union's transformer, in place; nothing in other networks."""
    for layer in getattr(network, "transformer_layes", ()):
        layer.attn = SequenceAttention(layer.attn)


def in_float32(network: Any) -> None:
    """Widen the attentions of a union's transformer: torch's reads the weights of a module inside of it past that
    module's hooks (`verification.compare.widened`)."""
    for layer in getattr(network, "transformer_layes", ()):
        layer.attn.float()
