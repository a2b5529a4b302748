"""The transformer parts of diffusers' networks over (batch, channels, 1, length), with diffusers' parameter names.

What they compute, and in which order, is diffusers'; each is made from diffusers' own module and takes over its
parameters. A configuration that is not covered is refused by name when the module is built: no result is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffusion_convert.networks.attention import Attend
from diffusion_convert.networks.channel_norm import ChannelNorm
from diffusion_convert.networks.pointwise import pointwise
from diffusion_runtime.errors import UnsupportedError

# What these compute is softmax(scale · query keyᵀ) value. Diffusers' other processors compute something else.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
# Of IP-Adapters: to the same queries, keys and values of pictures beside those of the text.
PICTURE_PROCESSORS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")
# What cross-attentions attend to: a text's states; or those, each IP-Adapter's tokens of its picture and its scale.
Context = torch.Tensor | tuple[torch.Tensor, tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]


class Attention(nn.Module):
    """diffusers' Attention without norms: self-attention, or cross-attention where ``context`` is given.

    ``upcast_attention`` needs nothing here: it says that float16 overflows, which the export finds and cures.
    """

    processors: tuple[str, ...] = PLAIN_PROCESSORS

    def __init__(self, attention: Any, attend: Attend) -> None:
        super().__init__()
        refuse(
            attention,
            ("spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim", "add_k_proj", "is_causal"),
        )
        if type(attention.processor).__name__ not in self.processors:
            raise UnsupportedError(f"attention processor {type(attention.processor).__name__} is not supported")
        if attention.inner_kv_dim != attention.inner_dim:
            raise UnsupportedError("kv_heads: fewer heads for keys than for queries are not supported")
        self.heads = int(attention.heads)
        self.scale = float(attention.scale)
        self.attend = attend
        self.to_q = pointwise(attention.to_q)
        self.to_k = pointwise(attention.to_k)
        self.to_v = pointwise(attention.to_v)
        self.to_out = nn.ModuleList([pointwise(attention.to_out[0])])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        source = x if context is None else context
        mixed = self.attend(self.to_q(x), self.to_k(source), self.to_v(source), self.heads, self.scale)
        out: torch.Tensor = self.to_out[0](mixed)
        return out


class PictureAttention(Attention):
    """Cross-attention of a UNet with IP-Adapters (Ye et al. 2023): what each picture gives is added, at its scale,
    to what the text gives, before the last projection. All share the query."""

    processors = PICTURE_PROCESSORS

    def __init__(self, attention: Any, attend: Attend) -> None:
        super().__init__(attention, attend)
        self.to_k_ip = nn.ModuleList(pointwise(layer) for layer in attention.processor.to_k_ip)
        self.to_v_ip = nn.ModuleList(pointwise(layer) for layer in attention.processor.to_v_ip)

    def forward(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
        text, (pictures, scales) = context
        query = self.to_q(x)
        mixed = self.attend(query, self.to_k(text), self.to_v(text), self.heads, self.scale)
        for tokens, scale, to_k, to_v in zip(pictures, scales, self.to_k_ip, self.to_v_ip, strict=True):
            mixed = mixed + self.attend(query, to_k(tokens), to_v(tokens), self.heads, self.scale) * scale
        out: torch.Tensor = self.to_out[0](mixed)
        return out


def cross_attention(attention: Any, attend: Attend) -> Attention:
    """The second attention of a transformer block, to a text and, with IP-Adapters, to pictures."""
    sees = type(attention.processor).__name__ in PICTURE_PROCESSORS
    return (PictureAttention if sees else Attention)(attention, attend)


class SpatialAttention(nn.Module):
    """diffusers' Attention over the positions of (batch, channels, height, width), with group norm and residual:
    that of VAEs, and of the Attn…Block2D of UNets."""

    def __init__(self, attention: Any, attend: Attend) -> None:
        super().__init__()
        if attention.group_norm is None or attention.is_cross_attention:
            raise UnsupportedError("attention outside of a Transformer2DModel is supported with a group norm only")
        self.group_norm = attention.group_norm
        self.residual = bool(attention.residual_connection)
        self.divisor = float(attention.rescale_output_factor)
        within = Attention(attention, attend)
        self.to_q, self.to_k, self.to_v, self.to_out = within.to_q, within.to_k, within.to_v, within.to_out
        self.heads, self.scale, self.attend = within.heads, within.scale, attend

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        del temb  # for spatial_norm only
        shape = [int(size) for size in hidden_states.shape]
        x = self.group_norm(hidden_states).reshape(*shape[:2], 1, shape[2] * shape[3])
        mixed = self.attend(self.to_q(x), self.to_k(x), self.to_v(x), self.heads, self.scale)
        out: torch.Tensor = self.to_out[0](mixed).reshape(shape)
        if self.residual:
            out = out + hidden_states
        return out / self.divisor if self.divisor != 1.0 else out


class Gate(nn.Module):
    """The first layer of diffusers' FeedForward: a projection and its activation, gated or not."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        name = type(activation).__name__
        if name not in ACTIVATIONS:
            raise UnsupportedError(f"activation_fn: feed-forward activation {name} is not supported")
        self.proj = pointwise(activation.proj)
        self.gated = name in ("GEGLU", "SwiGLU")
        self.activation = ACTIVATIONS[name](activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        gate = x
        if self.gated:
            # The value first, then its gate: diffusers' order.
            half = self.proj.out_channels // 2
            x, gate = torch.split(x, [half, half], dim=1)
        activated: torch.Tensor = self.activation(gate)
        return x * activated if self.gated else activated


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x): section 2 of "Gaussian Error Linear Units" (arXiv:1606.08415)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


# By the name of diffusers' activation: what is applied to its projection, or to the second half of it.
ACTIVATIONS: dict[str, Callable[[Any], nn.Module]] = {
    "GEGLU": lambda _: nn.GELU(),
    "SwiGLU": lambda _: nn.SiLU(),
    "GELU": lambda activation: nn.GELU(activation.approximate),
    "ApproximateGELU": lambda _: QuickGELU(),
    "LinearActivation": lambda activation: activation.activation,
}


class FeedForward(nn.Module):
    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        # The second is dropout; names of parameters stay the checkpoint's, so its place is kept.
        first, _, last = feed_forward.net[:3]
        self.net = nn.ModuleList([Gate(first), nn.Identity(), pointwise(last)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net[2](self.net[0](x))
        return out


class TransformerBlock(nn.Module):
    """diffusers' BasicTransformerBlock with ``norm_type`` "layer_norm"."""

    def __init__(self, block: Any, attend: Attend) -> None:
        super().__init__()
        if block.norm_type != "layer_norm":
            raise UnsupportedError(f"norm_type {block.norm_type!r} is not supported: expected 'layer_norm'")
        refuse(block, ("pos_embed", "fuser"))
        self.only_cross_attention = bool(block.only_cross_attention)
        self.norm1 = ChannelNorm(block.norm1)
        self.attn1 = Attention(block.attn1, attend)
        self.norm2 = None if block.attn2 is None else ChannelNorm(block.norm2)
        self.attn2 = None if block.attn2 is None else cross_attention(block.attn2, attend)
        self.norm3 = ChannelNorm(block.norm3)
        self.ff = FeedForward(block.ff)

    def forward(self, x: torch.Tensor, context: Context | None) -> torch.Tensor:
        x = self.attn1(self.norm1(x), context if self.only_cross_attention else None) + x
        if self.attn2 is not None and self.norm2 is not None:
            x = self.attn2(self.norm2(x), context) + x
        out: torch.Tensor = self.ff(self.norm3(x)) + x
        return out


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel over pictures; ``encoder_hidden_states`` is (batch, width, 1, tokens)."""

    def __init__(self, transformer: Any, attend: Attend) -> None:
        super().__init__()
        if not transformer.is_input_continuous:
            raise UnsupportedError("patch_size, num_vector_embeds: only transformers over pictures are supported")
        self.norm = transformer.norm
        self.proj_in = pointwise(transformer.proj_in)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(block, attend) for block in transformer.transformer_blocks
        )
        self.proj_out = pointwise(transformer.proj_out)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Context | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **_: Any,  # diffusers' blocks pass timestep, class_labels and the like, for norms that are refused
    ) -> tuple[torch.Tensor]:
        if attention_mask is not None or encoder_attention_mask is not None:
            raise UnsupportedError("attention masks in the UNet are not supported")
        batch, height, width = (int(hidden_states.shape[axis]) for axis in (0, 2, 3))
        x = self.proj_in(self.norm(hidden_states))
        # Sizes as Python's numbers: traced ones would put shape arithmetic into the program.
        x = x.reshape(batch, self.proj_in.out_channels, 1, height * width)
        for block in self.transformer_blocks:
            x = block(x, encoder_hidden_states)
        x = self.proj_out(x.reshape(batch, self.proj_in.out_channels, height, width))
        return (x + hidden_states,)


def refuse(module: Any, attributes: tuple[str, ...]) -> None:
    """Raise UnsupportedError where one of ``attributes`` of diffusers' ``module`` is set."""
    for name in attributes:
        value = getattr(module, name, None)
        if value is not None and value is not False:
            raise UnsupportedError(f"{type(module).__name__} with {name} is not supported")
