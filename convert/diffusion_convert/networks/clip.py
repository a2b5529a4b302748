"""CLIP's encoders over (batch, channels, 1, length), with transformers' parameter names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_convert.networks.attention import Attend
from diffusion_convert.networks.channel_norm import ChannelNorm
from diffusion_convert.networks.pointwise import pointwise

# Added where a token must not be looked at: exp of it is 0 in float16 and float32 alike. -inf and float32's lowest
# value overflow float16.
MASKED = -1e4

# transformers: checkpoints from before its pull request 24773 say 2, whatever the end-of-text token is.
LEGACY_EOS = 2


class SelfAttention(nn.Module):
    def __init__(self, attention: Any, attend: Attend) -> None:
        super().__init__()
        self.heads, self.scale, self.attend = int(attention.num_heads), float(attention.scale), attend
        self.q_proj = pointwise(attention.q_proj)
        self.k_proj = pointwise(attention.k_proj)
        self.v_proj = pointwise(attention.v_proj)
        self.out_proj = pointwise(attention.out_proj)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        mixed = self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.scale, mask)
        out: torch.Tensor = self.out_proj(mixed)
        return out


class Perceptron(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1 = pointwise(mlp.fc1)
        self.activation = mlp.activation_fn
        self.fc2 = pointwise(mlp.fc2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class Layer(nn.Module):
    """transformers' CLIPEncoderLayer."""

    def __init__(self, layer: Any, attend: Attend) -> None:
        super().__init__()
        self.layer_norm1 = ChannelNorm(layer.layer_norm1)
        self.self_attn = SelfAttention(layer.self_attn, attend)
        self.layer_norm2 = ChannelNorm(layer.layer_norm2)
        self.mlp = Perceptron(layer.mlp)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.self_attn(self.layer_norm1(x), mask) + x
        out: torch.Tensor = self.mlp(self.layer_norm2(x)) + x
        return out


class Encoder(nn.Module):
    """transformers' CLIPEncoder."""

    def __init__(self, encoder: Any, attend: Attend) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(layer, attend) for layer in encoder.layers)

    def hidden_states(self, x: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        """What goes into the first layer, and what comes out of each: transformers' ``hidden_states``."""
        # No `forward`: a call of this module would stand in the names of all operations, which packages keep.
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1], mask))
        return found


class TextEncoder(nn.Module):
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection, for one prompt.

    input_ids (1, length), float or integer -> states (1, length, width) and the pooled state of the first
    end-of-text token, (1, width), or (1, projection) where the model projects it. States are those after the last
    layer and its norm (``last_hidden_state``), or, with ``penultimate``, those before the last layer
    (``hidden_states[-2]``, what SDXL's UNets attend to). With ``skip``, they are those from so many layers earlier,
    and those without it follow as a third output: diffusers takes them for negative prompts. Parameters are named
    as in checkpoints: ``text_model.…``.
    """

    def __init__(self, model: Any, attend: Attend, penultimate: bool = False, skip: int = 0) -> None:
        super().__init__()
        self.text_model = TextModel(getattr(model, "text_model", model), attend, penultimate, skip)
        projection = getattr(model, "text_projection", None)
        self.text_projection = None if projection is None else pointwise(projection)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states, pooled, *unskipped = self.text_model(input_ids.to(torch.int32))
        if self.text_projection is not None:
            pooled = self.text_projection(pooled[:, :, None, None]).flatten(1)
        return states, pooled, *unskipped


class TextModel(nn.Module):
    """`TextEncoder` without the prefix of its parameters' names; ``input_ids`` are integers."""

    causal: torch.Tensor

    def __init__(self, model: Any, attend: Attend, penultimate: bool = False, skip: int = 0) -> None:
        super().__init__()
        self.penultimate, self.skip = penultimate, skip
        self.eos_token_id = int(model.config.eos_token_id)
        self.embeddings = TextEmbeddings(model.embeddings)
        self.encoder = Encoder(model.encoder, attend)
        self.final_layer_norm = ChannelNorm(model.final_layer_norm)
        length = int(model.config.max_position_embeddings)
        # (1, keys, 1, queries): a query does not see the keys after it.
        causal = torch.full((length, length), MASKED).tril(-1)[None, :, None]
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        length = int(input_ids.shape[1])
        x = self.embeddings(input_ids).transpose(1, 2).unsqueeze(2)
        hidden = self.encoder.hidden_states(x, first(first(self.causal, length, 1), length, 3))
        last = _by_token(self.final_layer_norm(hidden[-1]))
        pooled = last.index_select(1, self._end(input_ids)).squeeze(1)
        usual = _by_token(hidden[-2]) if self.penultimate else last
        if not self.skip:
            return usual, pooled
        # diffusers: the last norm is applied to the earlier states as to the last ones, but not SDXL's.
        earlier = hidden[-2 - self.skip] if self.penultimate else self.final_layer_norm(hidden[-1 - self.skip])
        return _by_token(earlier), pooled, usual

    def _end(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The position of the first end-of-text token, (1,): argmax gives the first of equal values."""
        if self.eos_token_id == LEGACY_EOS:
            return input_ids.argmax(dim=1)  # end-of-text is the last entry of CLIP's vocabulary
        return (input_ids == self.eos_token_id).to(torch.int32).argmax(dim=1)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """(1, width, 1, length) -> (1, length, width)"""
    return x.squeeze(2).transpose(1, 2)


class TextEmbeddings(nn.Module):
    """transformers' CLIPTextEmbeddings: (1, length) -> (1, length, width)."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.token_embedding: nn.Embedding = embeddings.token_embedding
        self.position_embedding: nn.Embedding = embeddings.position_embedding

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = int(input_ids.shape[1])
        tokens: torch.Tensor = self.token_embedding(input_ids)
        return tokens + first(self.position_embedding.weight, length, 0)


class VisionEncoder(nn.Module):
    """transformers' CLIPVisionModel: pixel_values (1, 3, size, size) -> pooled output (1, width).

    Parameters are named without the prefix ``vision_model.`` of checkpoints of the model alone.
    """

    def __init__(self, model: Any, attend: Attend) -> None:
        super().__init__()
        model = getattr(model, "vision_model", model)
        self.embeddings = VisionEmbeddings(model.embeddings)
        self.pre_layrnorm = ChannelNorm(model.pre_layrnorm)
        self.encoder = Encoder(model.encoder, attend)
        self.post_layernorm = ChannelNorm(model.post_layernorm)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.both(pixel_values)[1]

    def both(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of all patches before the last layer, (1, width, 1, 1 + patches), and the pooled output."""
        x = self.embeddings(pixel_values).transpose(1, 2).unsqueeze(2)
        *_, before, last = self.encoder.hidden_states(self.pre_layrnorm(x), None)
        pooled: torch.Tensor = self.post_layernorm(last[:, :, :, :1]).flatten(1)
        return before, pooled


class VisionEmbeddings(nn.Module):
    """transformers' CLIPVisionEmbeddings: (1, 3, size, size) -> (1, 1 + patches, width)."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.class_embedding: nn.Parameter = embeddings.class_embedding
        self.patch_embedding: nn.Conv2d = embeddings.patch_embedding
        self.position_embedding: nn.Embedding = embeddings.position_embedding

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        # Positions are added in this layout: transposed, they would not be the checkpoint's tensor any more.
        tokens = torch.cat([self.class_embedding[None, None], patches], dim=1)
        return tokens + self.position_embedding.weight


def first(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """The first ``length`` entries along ``dim``; the tensor itself, without an operation, where that is all."""
    return tensor if int(tensor.shape[dim]) == length else tensor.narrow(dim, 0, length)
