"""What makes an IP-Adapter's tokens of a picture: CLIP's image encoder, and each adapter's projection.

All of it runs once for a picture, not once for a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_convert.networks.attention import Attend
from diffusion_convert.networks.channel_norm import ChannelNorm
from diffusion_convert.networks.clip import VisionEncoder
from diffusion_convert.networks.pointwise import pointwise
from diffusion_convert.networks.transformer import Attention, FeedForward
from diffusion_runtime.errors import UnsupportedError


class ImageEncoder(nn.Module):
    """transformers' CLIPVisionModelWithProjection: pixel_values (1, 3, size, size) -> those of ``gives``, in this
    order: "image_embeds" (1, projection), the projected pooled output; "hidden_states" (1, 1 + patches, width), the
    states before the last layer."""

    def __init__(self, model: Any, attend: Attend, gives: tuple[str, ...]) -> None:
        super().__init__()
        self.gives = gives
        self.vision_model = VisionEncoder(model.vision_model, attend)
        self.visual_projection = model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        states, pooled = self.vision_model.both(pixel_values)
        found = []
        if "image_embeds" in self.gives:
            found.append(self.visual_projection(pooled))
        if "hidden_states" in self.gives:
            found.append(states.squeeze(2).transpose(1, 2))
        return tuple(found) if len(found) > 1 else found[0]


class Resampler(nn.Module):
    """diffusers' IPAdapterPlusImageProjection: (1, patches, width) -> (1, states' width, 1, tokens)."""

    def __init__(self, projection: Any, attend: Attend) -> None:
        super().__init__()
        self.latents = projection.latents
        self.proj_in = pointwise(projection.proj_in)
        self.layers = nn.ModuleList(ResamplerBlock(block, attend) for block in projection.layers)
        self.proj_out = pointwise(projection.proj_out)
        self.norm_out = ChannelNorm(projection.norm_out)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(states.transpose(1, 2).unsqueeze(2))
        latents = self.latents.transpose(1, 2).unsqueeze(2)
        for block in self.layers:
            latents = block(x, latents)
        out: torch.Tensor = self.norm_out(self.proj_out(latents))
        return out


class ResamplerBlock(nn.Module):
    """Latents that attend to a picture and to themselves."""

    def __init__(self, block: Any, attend: Attend) -> None:
        super().__init__()
        self.ln0, self.ln1 = ChannelNorm(block.ln0), ChannelNorm(block.ln1)
        self.attn = Attention(block.attn, attend)
        norm, feed_forward = block.ff
        self.ff = nn.ModuleList([ChannelNorm(norm), FeedForward(feed_forward)])

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        own = self.ln1(latents)
        latents = self.attn(own, torch.cat([self.ln0(x), own], dim=3)) + latents
        out: torch.Tensor = self.ff[1](self.ff[0](latents)) + latents
        return out


class Transposed(nn.Module):
    """A projection of diffusers as it is, its tokens (1, tokens, width) turned to (1, width, 1, tokens)."""

    def __init__(self, projection: Any) -> None:
        super().__init__()
        if hasattr(projection, "image_embeds"):  # whose weights' type diffusers rounds to, as it stands in a file
            projection.image_embeds.float()
        self.projection = projection

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.projection(picture)
        return tokens.transpose(1, 2).unsqueeze(2)


def projection(module: Any, attend: Attend | None) -> nn.Module:
    """An IP-Adapter's projection; ``attend`` None: as diffusers built it. Raises UnsupportedError for one that
    takes more than what CLIP says of a picture."""
    name = type(module).__name__
    if name not in ("ImageProjection", "IPAdapterPlusImageProjection", "IPAdapterFullImageProjection"):
        raise UnsupportedError(f"{name} is not supported")
    plus = name == "IPAdapterPlusImageProjection"
    return Resampler(module, attend) if plus and attend is not None else Transposed(module)
