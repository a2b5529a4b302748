"""CLIP's text encoder: token ids to the states that the UNet attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.family import text_length
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.networks import text_encoder
from diffusion_runtime.families import AttentionKind


class Reference(nn.Module):
    """transformers' CLIPTextModel, alone or in a model that projects its pooled state: input_ids (1, length) ->
    last_hidden_state, pooled_outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = getattr(model, "text_model", model)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model(input_ids=input_ids.long())
        return states.last_hidden_state, states.pooler_output


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:  # noqa: ARG001
    model = torch_networks.build(checkpoint, "text_encoder")
    config = checkpoint.models["text_encoder"].config
    length, width = text_length(checkpoint), int(config["hidden_size"])
    return Graph(
        module=Reference(model) if attention is None else text_encoder(model, attention),
        inputs=(Port("input_ids", (1, length), "float32", "The token ids of a prompt, padded to their number"),),
        outputs=(
            Port("last_hidden_state", (1, length, width), "float32", "The states of all tokens, for the UNet"),
            Port("pooled_outputs", (1, width), "float32", "The state of the first end-of-text token"),
        ),
        sample=lambda seed: {"input_ids": prompt_ids(config, seed, length).astype(np.float32)},
        description="Encodes a prompt's tokens into the states that the UNet attends to.",
    )


def prompt_ids(config: Mapping[str, Any], seed: int, length: int | None = None) -> np.ndarray:
    """(1, length) int64: a made-up prompt as CLIP's tokenizer would give it: begin, some tokens, end, padding."""
    rng = np.random.default_rng(seed)
    length = length or int(config.get("max_position_embeddings", 77))
    end = int(config["vocab_size"]) - 1
    words = int(rng.integers(3, length - 2))
    ids = np.full((1, length), end, np.int64)
    ids[0, 0] = end - 1
    ids[0, 1 : 1 + words] = rng.integers(0, end - 1, words)
    return ids


TEXT_ENCODER = Component(
    name="text_encoder",
    build=build,
    min_psnr_db=60.0,
    runs=3,
    palettized=True,
)
