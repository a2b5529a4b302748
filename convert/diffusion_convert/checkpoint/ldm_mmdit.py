"""From the names of Stability AI's MMDiT, Stable Diffusion 3's transformer, to diffusers' names.

diffusers' own mapping copies every weight, and says of a tensor that it has no place for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint.computed import Computed
from diffusion_runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from diffusion_convert.checkpoint.ldm_shapes import Tensors

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


def mmdit(tensors: Tensors, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """The same tensors by SD3Transformer2DModel's names. Raises CheckpointError for a name that it has no place
    for."""
    mapped: dict[str, torch.Tensor] = {"pos_embed.pos_embed": tensors["pos_embed"]}
    swapped = set()
    last = f"joint_blocks.{int(config['num_layers']) - 1}.context_block.adaLN_modulation.1"
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in ("final_layer.adaLN_modulation.1", last):
            place = "norm_out.linear" if module.startswith("final") else _block_name(module)[0]
            swapped.add(f"{place}.{kind}")
            mapped[f"{place}.{kind}"] = value
        elif module in _SINGLE:
            mapped[f"{_SINGLE[module]}.{kind}"] = value
        elif name != "pos_embed":
            places = _block_name(module)
            parts = value.chunk(len(places)) if len(places) > 1 else [value]
            mapped |= {f"{place}.{kind}": part for place, part in zip(places, parts, strict=True)}
    return Computed(mapped, dict.fromkeys(swapped, _swap))


def _block_name(module: str) -> tuple[str, ...]:
    head, number, stream, *rest = module.split(".")
    inner = ".".join(rest)
    if head == "joint_blocks" and stream in _STREAMS:
        if inner in _STREAMS[stream]:
            return (f"transformer_blocks.{number}.{_STREAMS[stream][inner]}",)
        if (stream, inner) in _TOGETHER:
            return tuple(f"transformer_blocks.{number}.{name}" for name in _TOGETHER[stream, inner])
    raise CheckpointError(f"{module}: no part of Stable Diffusion 3's transformer")


def _swap(value: torch.Tensor) -> torch.Tensor:
    """Scale and shift in diffusers' order, which is the other one, where no gates follow."""
    import torch

    return torch.cat(list(value.chunk(2))[::-1])
