"""T5's text encoder: token ids to the states that follow CLIP's in Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.family import text_length
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.networks import t5
from diffusion_runtime.families import COMPONENTS, T5, AttentionKind

SUBFOLDER = COMPONENTS[T5].subfolder
SPECIAL = 3
"""Numbers of tokens that stand for no text: padding 0, the end 1, what is unknown 2."""


class Reference(nn.Module):
    """transformers' T5EncoderModel, with the interface of the Core ML model.

    transformers rounds what goes into `wo`, and what norms give, to the type of their weights, whatever they are
    computed in: 16-bit weights would make numbers of 16 bits of them, of which some overflow."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        for block in model.encoder.block:
            attention, dense = block.layer
            attention.layer_norm.float()
            dense.layer_norm.float()
            dense.DenseReluDense.wo = Unrounded(dense.DenseReluDense.wo)
        model.encoder.final_layer_norm.float()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(input_ids=input_ids.long()).last_hidden_state
        return states.transpose(1, 2).unsqueeze(2)


class Unrounded(nn.Module):
    """A layer that shows no weight, whose type its caller would round to."""

    weight = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    model: Any = torch_networks.build(checkpoint, SUBFOLDER)
    clip = text_length(checkpoint)
    length = (shape.context_length or 2 * clip) - clip
    width, vocabulary = int(model.config.d_model), int(model.config.vocab_size)
    module = Reference(model) if attention is None else t5.Encoder(model, length).eval()
    return Graph(
        module=module,
        inputs=(Port("input_ids", (1, length), "float32", "The token ids of a prompt, padded to their number"),),
        outputs=(Port("encoder_hidden_states", (1, width, 1, length), "float32", "The states of all tokens"),),
        sample=lambda seed: {"input_ids": _prompt_ids(vocabulary, length, seed)},
        description="Encodes a prompt's tokens into the states that the transformer attends to after CLIP's.",
        exact=tuple(name for name, part in module.named_modules() if isinstance(part, t5.EXACT)),
    )


def _prompt_ids(vocabulary: int, length: int, seed: int) -> np.ndarray:
    """(1, length) float32: a made-up prompt as T5's tokenizer would give it: some tokens, the end, padding."""
    rng = np.random.default_rng(seed)
    words = int(rng.integers(1, length))
    ids = np.zeros((1, length), np.float32)
    ids[0, :words] = rng.integers(SPECIAL, vocabulary, words)
    ids[0, words] = 1
    return ids


TEXT_ENCODER_T5 = Component(
    name=T5,
    build=build,
    min_psnr_db=60.0,
    runs=2,
    palettized=True,
    one_size=True,
)
