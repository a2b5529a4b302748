"""From the names of Stability AI's MMDiT, Stable Diffusion 3's transformer, to diffusers' names.

diffusers' own mapping copies every weight, and says of a tensor that it has no place for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffusion_convert.checkpoint.computed import Computed
from diffusion_convert.checkpoint.ldm_shapes import Tensors
from diffusion_runtime.errors import CheckpointError

_SINGLE: Mapping[str, str] = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_STREAMS: Mapping[str, Mapping[str, str]] = {
    "x_block": {
        "attn.proj": "attn.to_out.0",
        "attn.ln_q": "attn.norm_q",
        "attn.ln_k": "attn.norm_k",
        "attn2.proj": "attn2.to_out.0",
        "attn2.ln_q": "attn2.norm_q",
        "attn2.ln_k": "attn2.norm_k",
        "adaLN_modulation.1": "norm1.linear",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    "context_block": {
        "attn.proj": "attn.to_add_out",
        "attn.ln_q": "attn.norm_added_q",
        "attn.ln_k": "attn.norm_added_k",
        "adaLN_modulation.1": "norm1_context.linear",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}
_TOGETHER: Mapping[tuple[str, str], tuple[str, str, str]] = {
    ("x_block", "attn.qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("x_block", "attn2.qkv"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ("context_block", "attn.qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Queries, keys and values, which lie in one tensor."""


@dataclass(frozen=True, slots=True)
class Own:
    """What a module is in diffusers' network: one module, or several whose rows follow each other. ``swapped``: the
    halves of its rows are in the other order (`swap`)."""

    modules: tuple[str, ...]
    swapped: bool = False


def modules(blocks: int) -> dict[str, Own]:
    """Of a transformer of so many blocks, what each of Stability AI's modules is in diffusers'."""
    found = {name: Own((own,)) for name, own in _SINGLE.items()}
    found["final_layer.adaLN_modulation.1"] = Own(("norm_out.linear",), swapped=True)
    for number in range(blocks):
        at, own = f"joint_blocks.{number}", f"transformer_blocks.{number}"
        for stream, names in _STREAMS.items():
            found |= {f"{at}.{stream}.{name}": Own((f"{own}.{inner}",)) for name, inner in names.items()}
        for (stream, name), several in _TOGETHER.items():
            found[f"{at}.{stream}.{name}"] = Own(tuple(f"{own}.{inner}" for inner in several))
    last = f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1"
    return {**found, last: replace(found[last], swapped=True)} if blocks else found


def mmdit(tensors: Tensors, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """The same tensors by SD3Transformer2DModel's names. Raises CheckpointError for a name that it has no place
    for."""
    mapped: dict[str, torch.Tensor] = {"pos_embed.pos_embed": tensors["pos_embed"]}
    swapped, known = set(), modules(int(config["num_layers"]))
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        if name == "pos_embed":
            continue
        if (own := known.get(module)) is None:
            raise CheckpointError(f"{module}: no part of Stable Diffusion 3's transformer")
        several = len(own.modules)
        parts = value.chunk(several) if several > 1 else [value]
        mapped |= {f"{place}.{kind}": part for place, part in zip(own.modules, parts, strict=True)}
        if own.swapped:
            swapped.add(f"{own.modules[0]}.{kind}")
    return Computed(mapped, dict.fromkeys(swapped, swap))


def swap(value: torch.Tensor) -> torch.Tensor:
    """Scale and shift in diffusers' order, which is the other one, where no gates follow."""
    return torch.cat(list(value.chunk(2))[::-1])
