"""CLIP's text encoder: token ids to the states that the UNet attends to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import folding, torch_networks
from diffusion_convert.checkpoint.family import text_length
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.clip import TextEncoder
from diffusion_convert.networks.folding import Padding
from diffusion_runtime.families import FAMILIES, TEXT_ENCODERS, AttentionKind
from diffusion_runtime.prompt.text_states import UNSKIPPED


class Reference(nn.Module):
    """transformers' own model: input_ids (1, length) -> states, pooled state, as `clip.TextEncoder` gives them."""

    def __init__(self, model: Any, penultimate: bool, skip: int = 0) -> None:
        super().__init__()
        self.model = model
        self.penultimate, self.skip = penultimate, skip

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(input_ids=input_ids.long(), output_hidden_states=True)
        usual = found.hidden_states[-2] if self.penultimate else found.last_hidden_state
        pooled = found.text_embeds if "text_embeds" in found else found.pooler_output
        if not self.skip:
            return usual, pooled
        if self.penultimate:
            return found.hidden_states[-2 - self.skip], pooled, usual
        return self.model.final_layer_norm(found.hidden_states[-1 - self.skip]), pooled, usual


class Padded(nn.Module):
    """A text encoder that takes prompts with the padding of apps, too."""

    def __init__(self, encoder: nn.Module, padding: Padding) -> None:
        super().__init__()
        self.encoder = encoder
        self.padding = padding

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = self.encoder(self.padding(input_ids))
        return result


def attends_penultimate(checkpoint: Checkpoint) -> bool:
    """Whether the UNet takes the encoders' states from before their last layer: SDXL and its refiner."""
    return "text_encoder_2" in checkpoint.models


def most_skipped(checkpoint: Checkpoint) -> int:
    """How many of the text encoders' layers clip skip can leave out."""
    counts = [
        int(model.config.get("num_hidden_layers", 12))
        for name, model in checkpoint.models.items()
        if name in TEXT_ENCODERS
    ]
    return min(counts, default=0) - attends_penultimate(checkpoint)


def reference(checkpoint: Checkpoint, subfolder: str) -> Reference:
    """transformers' own network of ``subfolder`` on the checkpoint's weights."""
    return Reference(_network(checkpoint, subfolder), attends_penultimate(checkpoint))


def _network(checkpoint: Checkpoint, subfolder: str) -> nn.Module:
    """Only SDXL's second encoder and all of Stable Diffusion 3's are asked for their projected state: any other is
    taken without its projection."""
    model = torch_networks.build(checkpoint, subfolder)
    projected = subfolder == "text_encoder_2" or FAMILIES[checkpoint.family].joint_text
    inner: nn.Module = model if projected else getattr(model, "text_model", model)
    return inner


def build(
    checkpoint: Checkpoint,
    attention: AttentionKind | None,
    shape: Shape,  # noqa: ARG001
    subfolder: str,
) -> Graph:
    penultimate = attends_penultimate(checkpoint)
    model = _network(checkpoint, subfolder)
    config = checkpoint.models[subfolder].config
    length, width = text_length(checkpoint, subfolder), int(config["hidden_size"])
    pooled = int(config["projection_dim"]) if hasattr(model, "text_projection") else width
    states = (1, length, width)
    skip, name = checkpoint.clip_skip, "hidden_embeds" if penultimate else "last_hidden_state"
    which = "before the last layer" if penultimate else "of all tokens"
    encoder: nn.Module = (
        Reference(model, penultimate, skip)
        if attention is None
        else TextEncoder(model, ATTENTION[attention], penultimate, skip).eval()
    )
    padding = (checkpoint.folded.padding or {}).get(subfolder)
    if padding is not None:
        encoder = Padded(encoder, Padding(folding.end_token(checkpoint, subfolder), padding, length))
    return Graph(
        module=encoder,
        inputs=(Port("input_ids", (1, length), "float32", "The token ids of a prompt, padded to their number"),),
        outputs=(
            Port(
                name,
                states,
                "float32",
                f"The states {which}, for the UNet" + (f", {skip} layers earlier" if skip else ""),
            ),
            Port("pooled_outputs", (1, pooled), "float32", "The state of the first end-of-text token"),
            *((Port(UNSKIPPED, states, "float32", f"The states {which}, for negative prompts"),) if skip else ()),
        ),
        sample=lambda seed: {"input_ids": prompt_ids(config, seed, length).astype(np.float32)},
        description="Encodes a prompt's tokens into the states that the UNet attends to.",
        exact=() if padding is None else ("padding",),
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
    build=partial(build, subfolder="text_encoder"),
    min_psnr_db=60.0,
    runs=3,
    palettized=True,
    one_size=True,
)
