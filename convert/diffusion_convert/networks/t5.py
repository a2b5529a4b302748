"""T5's encoder over (1, channels, 1, length), with transformers' parameter names.

Raffel et al., 2020, in the form of T5 1.1: norms without mean or bias, gated feed-forward layers, attention whose
scores are not scaled and have a bias by how far the key is from the query.

In float16 the sums that run through all layers overflow, and so do the products of the last feed-forward
projection, which is why transformers keeps that in float32. Here its inputs are made smaller and its results
larger by the same power of two, after which the sums are float32: weights need no more than 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diffusion_convert.networks.pointwise import pointwise
from diffusion_runtime.errors import UnsupportedError

SHRINK = 64.0
"""What the inputs of the last feed-forward projection are divided by: its results may then be as large as 4e6."""
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu_new": lambda: nn.GELU("tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class Encoder(nn.Module):
    """transformers' T5EncoderModel without a mask, as diffusers' pipelines run it: input_ids (1, length), float or
    integer -> last_hidden_state (1, width, 1, length)."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        stack = model.encoder
        self.shared: nn.Embedding = model.shared
        first = stack.block[0].layer[0].SelfAttention
        # (1, heads, queries, keys): the first layer's, for all of them.
        self.register_buffer("bias", first.compute_bias(length, length).contiguous(), persistent=False)
        self.block = nn.ModuleList(Block(block) for block in stack.block)
        self.final_layer_norm = Norm(stack.final_layer_norm)

    bias: torch.Tensor

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.shared(input_ids.to(torch.int32)).transpose(1, 2).unsqueeze(2)
        for block in self.block:
            x = block(x, self.bias)
        normed: torch.Tensor = self.final_layer_norm(x)
        return normed


class Norm(nn.Module):
    """transformers' T5LayerNorm over the channels."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().reshape(1, -1, 1, 1), requires_grad=False)
        self.epsilon = float(norm.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.epsilon) * self.weight


class Sum(nn.Module):
    """``x + factor · more``. The factor, a power of two, is on ``x`` and on the sum: coremltools would put one on a
    layer's result into the weights of that layer, which then were float32, too."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return x + more if self.factor == 1.0 else (x * (1 / self.factor) + more) * self.factor


EXACT = (Norm, Sum)
"""Whose operations stay in float32."""


class Attention(nn.Module):
    """transformers' T5Attention, of an encoder, for one prompt."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = int(attention.n_heads)
        self.q, self.k, self.v, self.o = (pointwise(getattr(attention, name)) for name in "qkvo")

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(2, 3) + bias).softmax(dim=3) @ v
        length = int(x.shape[3])
        out: torch.Tensor = self.o(mixed.transpose(2, 3).reshape(1, self.o.in_channels, 1, length))
        return out

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(1, heads, length, each)"""
        channels, length = int(x.shape[1]), int(x.shape[3])
        return x.reshape(1, self.heads, channels // self.heads, length).transpose(2, 3)


class FeedForward(nn.Module):
    """transformers' T5DenseGatedActDense or T5DenseActDense; the result is `SHRINK` times too small."""

    def __init__(self, dense: Any, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UnsupportedError(f"dense_act_fn {activation!r} is not supported: {', '.join(ACTIVATIONS)}")
        self.gated = hasattr(dense, "wi_0")
        self.wi_0 = pointwise(dense.wi_0 if self.gated else dense.wi)
        self.wi_1 = pointwise(dense.wi_1) if self.gated else None
        self.activation = ACTIVATIONS[activation]()
        self.wo = pointwise(dense.wo)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.activation(self.wi_0(x)) * (1 / SHRINK)
        out: torch.Tensor = self.wo(wide if self.wi_1 is None else wide * self.wi_1(x))
        return out


class Block(nn.Module):
    """transformers' T5Block, of an encoder."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, dense = block.layer
        self.norm1, self.attention = Norm(attention.layer_norm), Attention(attention.SelfAttention)
        config = attention.SelfAttention.config
        self.norm2 = Norm(dense.layer_norm)
        self.feed_forward = FeedForward(dense.DenseReluDense, str(config.dense_act_fn))
        self.attended, self.fed = Sum(), Sum(SHRINK)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = self.attended(x, self.attention(self.norm1(x), bias))
        changed: torch.Tensor = self.fed(x, self.feed_forward(self.norm2(x)))
        return changed
