"""Stable Diffusion 3's transformer over (batch, channels, 1, length), with diffusers' parameter names.

What it computes, and in which order, is diffusers' SD3Transformer2DModel (Esser et al., 2024, figure 2): picture
and text are two streams with weights of their own, which meet in one attention over the tokens of both, the
picture's first. Stable Diffusion 3.5 adds a second attention over the picture's own tokens to some blocks, and
norms of queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_convert.networks.attention import Attend
from diffusion_convert.networks.channel_norm import ChannelNorm
from diffusion_convert.networks.pointwise import pointwise
from diffusion_convert.networks.transformer import FeedForward
from diffusion_runtime.errors import UnsupportedError

TIME_PROJECTION = "time_text_embed.time_proj"
"""Sines of the timestep: float16 has no room for their phase."""


class Transformer(nn.Module):
    """latents (batch, channels, height, width), states (batch, width, 1, tokens), pooled (batch, width, 1, 1)
    and timesteps (batch,) -> what the network predicts, of the latents' shape. ``size`` is that of the latents:
    positions are cut out of the checkpoint's table for it when the module is built."""

    def __init__(self, network: Any, attend: Attend, size: tuple[int, int]) -> None:
        super().__init__()
        self.pos_embed = Patches(network.pos_embed, size)
        self.time_text_embed = Conditioning(network.time_text_embed)
        self.context_embedder = pointwise(network.context_embedder)
        self.transformer_blocks = nn.ModuleList(Block(block, attend) for block in network.transformer_blocks)
        self.norm_out = Modulated(network.norm_out)
        self.proj_out = Unpatched(network.proj_out, int(network.config.patch_size), self.pos_embed.grid)

    def forward(
        self, latents: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        picture: torch.Tensor = self.pos_embed(latents)
        condition: torch.Tensor = self.time_text_embed(timestep, pooled)
        text: torch.Tensor | None = self.context_embedder(states)
        for block in self.transformer_blocks:
            picture, text = block(picture, text, condition)
        scale, shift = self.norm_out.parts(condition, 2)
        predicted: torch.Tensor = self.proj_out(self.norm_out(picture, shift, scale))
        return predicted


class Patches(nn.Module):
    """diffusers' PatchEmbed: (batch, channels, height, width) -> (batch, width, 1, patches), positions added."""

    def __init__(self, embed: Any, size: tuple[int, int]) -> None:
        super().__init__()
        if embed.norm is not None or not embed.pos_embed_max_size:
            raise UnsupportedError("pos_embed: only positions that are cut out of a larger table are supported")
        self.proj = embed.proj
        height, width = (side // embed.patch_size for side in size)
        self.grid = height, width
        if max(self.grid) > embed.pos_embed_max_size:
            raise UnsupportedError(
                f"latents of {size[1]}x{size[0]} (width x height) have more patches a side than the checkpoint has "
                f"positions: {embed.pos_embed_max_size}"
            )
        positions = embed.cropped_pos_embed(*size)  # (1, patches, width)
        self.register_buffer("positions", positions.transpose(1, 2).unsqueeze(2).contiguous(), persistent=False)

    positions: torch.Tensor

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.proj(latents)
        batch, width = (int(patches.shape[axis]) for axis in (0, 1))
        return patches.reshape(batch, width, 1, self.grid[0] * self.grid[1]) + self.positions


class Conditioning(nn.Module):
    """diffusers' CombinedTimestepTextProjEmbeddings: (batch, width, 1, 1), the activation of every block's
    modulation already applied: it is the same for all."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.time_proj = embed.time_proj
        self.timestep_embedder = Perceptron(embed.timestep_embedder, embed.timestep_embedder.act)
        self.text_embedder = Perceptron(embed.text_embedder, embed.text_embedder.act_1)

    def forward(self, timestep: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        time: torch.Tensor = self.timestep_embedder(self.time_proj(timestep)[:, :, None, None])
        both: torch.Tensor = time + self.text_embedder(pooled)
        return nn.functional.silu(both)


class Perceptron(nn.Module):
    def __init__(self, layers: Any, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = pointwise(layers.linear_1)
        self.activation = activation
        self.linear_2 = pointwise(layers.linear_2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out


class Modulated(nn.Module):
    """A norm whose shift and scale, and what else ``linear`` gives, follow from the condition: diffusers'
    AdaLayerNormZero, SD35AdaLayerNormZeroX and AdaLayerNormContinuous, whose ``parts`` have another order."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.linear = pointwise(norm.linear)
        self.norm = ChannelNorm(norm.norm)

    def parts(self, condition: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """``count`` tensors (batch, width, 1, 1)."""
        return torch.split(self.linear(condition), self.linear.out_channels // count, dim=1)

    def forward(self, x: torch.Tensor, *shifts_and_scales: torch.Tensor) -> Any:
        """The normed ``x``, scaled and shifted by each pair: a tensor for one pair, a tuple for several."""
        normed = self.norm(x)
        pairs = zip(shifts_and_scales[::2], shifts_and_scales[1::2], strict=True)
        made = tuple(normed * (1 + scale) + shift for shift, scale in pairs)
        return made[0] if len(made) == 1 else made


class HeadNorm(nn.Module):
    """diffusers' RMSNorm over the channels of each head of (batch, heads · each, 1, length)."""

    def __init__(self, norm: Any, heads: int) -> None:
        super().__init__()
        if type(norm).__name__ != "RMSNorm" or norm.weight is None or norm.bias is not None:
            raise UnsupportedError(f"qk_norm: {type(norm).__name__} is not supported: expected 'rms_norm'")
        self.weight = nn.Parameter(norm.weight.detach().reshape(1, 1, -1, 1), requires_grad=False)
        self.epsilon = float(norm.eps)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = [int(size) for size in x.shape]
        split = x.reshape(shape[0], self.heads, shape[1] // self.heads, shape[3])
        scaled = split * torch.rsqrt(split.square().mean(dim=2, keepdim=True) + self.epsilon)
        return (scaled * self.weight).reshape(shape)


def head_norm(norm: Any, heads: int) -> nn.Module:
    return nn.Identity() if norm is None else HeadNorm(norm, heads)


class Attention(nn.Module):
    """diffusers' Attention over the picture's tokens."""

    def __init__(self, attention: Any, attend: Attend) -> None:
        super().__init__()
        self.heads, self.scale, self.attend = int(attention.heads), float(attention.scale), attend
        self.to_q, self.to_k, self.to_v = (pointwise(getattr(attention, f"to_{name}")) for name in "qkv")
        self.norm_q, self.norm_k = (head_norm(getattr(attention, f"norm_{name}"), self.heads) for name in "qk")
        self.to_out = nn.ModuleList([pointwise(attention.to_out[0])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)
        out: torch.Tensor = self.to_out[0](self.attend(q, k, v, self.heads, self.scale))
        return out


class JointAttention(Attention):
    """diffusers' Attention with added projections, over the tokens of picture and text together."""

    def __init__(self, attention: Any, attend: Attend) -> None:
        super().__init__(attention, attend)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            pointwise(getattr(attention, f"add_{name}_proj")) for name in "qkv"
        )
        self.norm_added_q, self.norm_added_k = (
            head_norm(getattr(attention, f"norm_added_{name}"), self.heads) for name in "qk"
        )
        last = getattr(attention, "to_add_out", None)
        self.to_add_out = None if last is None else pointwise(last)

    def both(self, picture: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What goes to the picture's tokens, and to the text's; None in the last block, where nothing does."""
        query = torch.cat([self.norm_q(self.to_q(picture)), self.norm_added_q(self.add_q_proj(text))], dim=3)
        key = torch.cat([self.norm_k(self.to_k(picture)), self.norm_added_k(self.add_k_proj(text))], dim=3)
        value = torch.cat([self.to_v(picture), self.add_v_proj(text)], dim=3)
        mixed = self.attend(query, key, value, self.heads, self.scale)
        length = int(picture.shape[3])
        of_picture, of_text = torch.split(mixed, [length, int(text.shape[3])], dim=3)
        return self.to_out[0](of_picture), None if self.to_add_out is None else self.to_add_out(of_text)


class Block(nn.Module):
    """diffusers' JointTransformerBlock."""

    def __init__(self, block: Any, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm1_context = Modulated(block.norm1), Modulated(block.norm1_context)
        self.attn = JointAttention(block.attn, attend)
        self.attn2 = None if block.attn2 is None else Attention(block.attn2, attend)
        self.norm2, self.ff = ChannelNorm(block.norm2), FeedForward(block.ff)
        last = bool(block.context_pre_only)
        self.norm2_context = None if last else ChannelNorm(block.norm2_context)
        self.ff_context = None if last else FeedForward(block.ff_context)

    def forward(
        self, picture: torch.Tensor, text: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1.parts(
            condition, 6 if self.attn2 is None else 9
        )
        normed = self.norm1(picture, shift, scale, *second[:2])
        again: torch.Tensor | None = None
        if self.attn2 is not None:
            normed, again = normed
        if self.norm2_context is None or self.ff_context is None:  # no block follows that would take the text
            scale_text, shift_text = self.norm1_context.parts(condition, 2)
            mixed, _ = self.attn.both(normed, self.norm1_context(text, shift_text, scale_text))
            changed = None
        else:
            of_text = self.norm1_context.parts(condition, 6)
            mixed, mixed_text = self.attn.both(normed, self.norm1_context(text, *of_text[:2]))
            changed = text if mixed_text is None else text + of_text[2] * mixed_text
            changed = changed + of_text[5] * self.ff_context(
                self.norm2_context(changed) * (1 + of_text[4]) + of_text[3]
            )
        picture = picture + gate * mixed
        if self.attn2 is not None and again is not None:
            picture = picture + second[2] * self.attn2(again)
        return picture + gate_ff * self.ff(self.norm2(picture) * (1 + scale_ff) + shift_ff), changed


class Unpatched(nn.Module):
    """The last projection, its patches set back into their places: (batch, width, 1, patches) -> (batch, channels,
    height, width). Each patch comes as its rows, of pixels, of channels."""

    def __init__(self, layer: Any, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.projection, self.side, self.grid = pointwise(layer), patch_size, grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.projection(x)
        batch, channels = (int(projected.shape[axis]) for axis in (0, 1))
        (height, width), side = self.grid, self.side
        # One axis after the other: Core ML knows no tensors of six dimensions.
        rows = projected.reshape(batch, side, channels // side, height, width).permute(0, 2, 3, 1, 4)
        pixels = rows.reshape(batch, side, channels // side**2, height * side, width).permute(0, 2, 3, 4, 1)
        return pixels.reshape(batch, channels // side**2, height * side, width * side)
