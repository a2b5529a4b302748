"""What the shapes in a CompVis (LDM) checkpoint say about its networks, as diffusers' configuration keys.

Widths, depths, where attention sits and how wide its context is are all in the shapes; head counts, activations and
the picture's size are not, and come from the family's data in ``configs/``. Names are those inside each network,
without the prefix that it has in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffusion_runtime.errors import CheckpointError

Tensors = Mapping[str, torch.Tensor]

MMDIT_HEAD_CHANNELS = 64
"""Of each head, in all published models; where queries and keys are normed, the norm's width tells."""
MAX_CHILDREN = 256
ADDED, GUIDANCE = "label_emb.0.0.weight", "time_embed.cond_proj.weight"
"""Where a UNet takes SDXL's sizes and pooled text, and a latent consistency model's guidance."""
FULL_OPEN_CLIP_BLOCKS = 24
"""OpenCLIP ViT-H's. Stable Diffusion 2 takes the states before the last; diffusers keeps only those before that."""


def unet(tensors: Tensors) -> dict[str, Any]:
    """UNet2DConditionModel's widths, depths, block types and context, from an LDM UNet's tensors."""
    blocks: list[list[int]] = [[]]
    for index in range(1, count(tensors, "input_blocks")):
        if f"input_blocks.{index}.0.op.weight" in tensors:
            blocks.append([])
        else:
            blocks[-1].append(index)
    if len({len(block) for block in blocks}) != 1 or not blocks[0]:
        raise CheckpointError(
            f"the UNet's blocks have {[len(block) for block in blocks]} layers: expected equal counts"
        )
    layers = len(blocks[0])
    down = [_attends(tensors, f"input_blocks.{block[0]}.1.") for block in blocks]
    up = [_attends(tensors, f"output_blocks.{index * (layers + 1)}.1.") for index in range(len(blocks))]
    cross = next((name for name in tensors if name.endswith("attn2.to_k.weight")), None)
    project = next((name for name in tensors if name.endswith("1.proj_in.weight")), None)
    if cross is None or project is None:
        raise CheckpointError("the UNet has no cross-attention: expected attn2.to_k.weight in its blocks")
    classes = shape(tensors, "label_emb.weight", 2)[0] if "label_emb.weight" in tensors else None
    added = shape(tensors, ADDED, 2)[1] if ADDED in tensors else None
    guided = shape(tensors, GUIDANCE, 2)[1] if GUIDANCE in tensors else None
    return {
        "block_out_channels": [
            shape(tensors, f"input_blocks.{block[0]}.0.in_layers.2.weight", 4)[0] for block in blocks
        ],
        "cross_attention_dim": shape(tensors, cross, 2)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in down],
        "in_channels": shape(tensors, "input_blocks.0.0.weight", 4)[1],
        "layers_per_block": layers,
        "mid_block_type": _mid_block(tensors),
        "num_class_embeds": classes,
        "out_channels": shape(tensors, "out.2.weight", 4)[0],
        "projection_class_embeddings_input_dim": added,
        "time_cond_proj_dim": guided,
        **_transformers(tensors, blocks, layers),
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
        "use_linear_projection": tensors[project].ndim == 2,
    }


def _mid_block(tensors: Tensors) -> str | None:
    """Distilled UNets have a middle of one layer without attention, or none."""
    if not count(tensors, "middle_block"):
        return None
    return "UNetMidBlock2DCrossAttn" if _attends(tensors, "middle_block.1.") else "UNetMidBlock2D"


def _transformers(tensors: Tensors, blocks: Sequence[Sequence[int]], layers: int) -> dict[str, Any]:
    """How many layers the transformers have, as diffusers' configurations say it: one number for all, one for each
    block, or one for each layer of a block; for the way up only where that is not the way down, turned round."""
    down = [_depths(tensors, [f"input_blocks.{index}.1" for index in block]) for block in blocks]
    up = [
        _depths(tensors, [f"output_blocks.{index * (layers + 1) + layer}.1" for layer in range(layers + 1)])
        for index in range(len(blocks))
    ]
    mid = _depths(tensors, ["middle_block.1"])
    used = [depth for depth in (*down, *up, mid) if depth]
    if all(depth == used[0] and isinstance(depth, int) for depth in used):
        return {"transformer_layers_per_block": used[0]}
    # diffusers gives the middle the depth of the last block, whether that attends or not.
    if not down[-1] and mid:
        down[-1] = mid  # the middle is as deep as the last block
    if mid and mid != down[-1]:
        raise CheckpointError(f"the UNet's middle has {mid} transformer layers, the block before it {down[-1]}")
    found: dict[str, Any] = {"transformer_layers_per_block": [depth or 1 for depth in down]}
    if any(one and one != other for one, other in zip(up, reversed(down), strict=True)):
        found["reverse_transformer_layers_per_block"] = [depth or 1 for depth in up]
    return found


def _depths(tensors: Tensors, places: Sequence[str]) -> int | list[int]:
    """How many layers the transformers there have, one number where all have as many; 0 where there are none."""
    found = [count(tensors, f"{place}.transformer_blocks") for place in places]
    return found[0] if len(set(found)) == 1 else found


def vae(tensors: Tensors) -> dict[str, Any]:
    """AutoencoderKL's widths and depths, from an LDM autoencoder's tensors."""
    levels = count(tensors, "encoder.down")
    return {
        "block_out_channels": [
            shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shape(tensors, "encoder.conv_in.weight", 4)[1],
        "latent_channels": shape(tensors, "decoder.conv_in.weight", 4)[1],
        "layers_per_block": count(tensors, "encoder.down.0.block"),
        "out_channels": shape(tensors, "decoder.conv_out.weight", 4)[0],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def clip(tensors: Tensors) -> dict[str, Any]:
    """CLIPTextModel's sizes with all layers, from a transformers text model's tensors (``text_model.…``)."""
    embeddings, layers = "text_model.embeddings", "text_model.encoder.layers"
    table, positions = f"{embeddings}.token_embedding.weight", f"{embeddings}.position_embedding.weight"
    return _text_sizes(tensors, table, positions, layers, "mlp.fc1.weight")


def open_clip(tensors: Tensors) -> dict[str, Any]:
    """CLIPTextModel's sizes with all layers, from an OpenCLIP text transformer's tensors."""
    layers = "transformer.resblocks"
    return _text_sizes(tensors, "token_embedding.weight", "positional_embedding", layers, "mlp.c_fc.weight")


def _text_sizes(tensors: Tensors, table: str, positions: str, layers: str, widens: str) -> dict[str, Any]:
    vocabulary, hidden = shape(tensors, table, 2)
    return {
        "hidden_size": hidden,
        "intermediate_size": shape(tensors, f"{layers}.0.{widens}", 2)[0],
        "max_position_embeddings": shape(tensors, positions, 2)[0],
        "num_hidden_layers": count(tensors, layers),
        "vocab_size": vocabulary,
    }


def clip_2(tensors: Tensors) -> dict[str, Any]:
    """CLIPTextModelWithProjection's sizes, from its tensors."""
    return {**clip(tensors), "projection_dim": shape(tensors, "text_projection.weight", 2)[0]}


def open_clip_2(tensors: Tensors) -> dict[str, Any]:
    """CLIPTextModelWithProjection's sizes, from an OpenCLIP text transformer's tensors with their projection, a
    matrix (states, projected) or, of newer writers, a linear layer."""
    if "text_projection" in tensors:
        return {**open_clip(tensors), "projection_dim": shape(tensors, "text_projection", 2)[1]}
    return {**open_clip(tensors), "projection_dim": shape(tensors, "text_projection.weight", 2)[0]}


def mmdit(tensors: Tensors) -> dict[str, Any]:
    """SD3Transformer2DModel's sizes, from the tensors of Stability AI's MMDiT."""
    width, channels, patch, _ = shape(tensors, "x_embedder.proj.weight", 4)
    blocks = count(tensors, "joint_blocks")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    each = shape(tensors, norm, 1)[0] if norm in tensors else MMDIT_HEAD_CHANNELS
    dual = [n for n in range(blocks) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in tensors]
    return {
        "attention_head_dim": each,
        "caption_projection_dim": shape(tensors, "context_embedder.weight", 2)[0],
        **({"dual_attention_layers": dual} if dual else {}),
        "in_channels": channels,
        "joint_attention_dim": shape(tensors, "context_embedder.weight", 2)[1],
        "num_attention_heads": width // each,
        "num_layers": blocks,
        "out_channels": shape(tensors, "final_layer.linear.weight", 2)[0] // patch**2,
        "patch_size": patch,
        "pooled_projection_dim": shape(tensors, "y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": math.isqrt(shape(tensors, "pos_embed", 3)[1]),
        **({"qk_norm": "rms_norm"} if norm in tensors else {}),
    }


def t5(tensors: Tensors) -> dict[str, Any]:
    """T5EncoderModel's sizes, from its own tensors."""
    vocabulary, width = shape(tensors, "shared.weight", 2)
    first = "encoder.block.0.layer"
    buckets, heads = shape(tensors, f"{first}.0.SelfAttention.relative_attention_bias.weight", 2)
    return {
        "d_ff": shape(tensors, f"{first}.1.DenseReluDense.wo.weight", 2)[1],
        "d_kv": shape(tensors, f"{first}.0.SelfAttention.q.weight", 2)[0] // heads,
        "d_model": width,
        "num_heads": heads,
        "num_layers": count(tensors, "encoder.block"),
        "relative_attention_num_buckets": buckets,
        "vocab_size": vocabulary,
    }


def clip_l(tensors: Tensors) -> dict[str, Any]:
    """CLIPTextModelWithProjection's sizes of the smaller encoder of Stable Diffusion 3, which projects onto
    itself."""
    sized = clip(tensors)
    return {**sized, "projection_dim": sized["hidden_size"]}


def depth(tensors: Tensors) -> dict[str, Any]:
    """DPTConfig's sizes, from the tensors of MiDaS' DPT hybrid. The patches form a square."""
    layers = count(tensors, "pretrained.model.blocks")
    hidden = shape(tensors, "pretrained.model.cls_token", 3)[-1]
    side = math.isqrt(shape(tensors, "pretrained.model.pos_embed", 3)[1])
    backbone = "pretrained.model.patch_embed.backbone"
    stages = range(count(tensors, f"{backbone}.stages"))
    widths = [shape(tensors, f"{backbone}.stages.{stage}.blocks.0.conv3.weight", 4)[0] for stage in stages]
    return {
        "backbone_config": {
            "depths": [count(tensors, f"{backbone}.stages.{stage}.blocks") for stage in stages],
            "embedding_size": shape(tensors, f"{backbone}.stem.conv.weight", 4)[0],
            "hidden_sizes": widths,
        },
        "backbone_featmap_shape": [1, widths[-1], side, side],
        "backbone_out_indices": [(quarter + 1) * layers // 4 - 1 for quarter in range(4)],
        "fusion_hidden_size": shape(tensors, "scratch.layer1_rn.weight", 4)[0],
        "hidden_size": hidden,
        "image_size": 16 * side,
        "intermediate_size": shape(tensors, "pretrained.model.blocks.0.mlp.fc1.weight", 2)[0],
        "neck_hidden_sizes": [shape(tensors, f"scratch.layer{level}_rn.weight", 4)[1] for level in range(1, 5)],
        "num_hidden_layers": layers,
    }


def count(tensors: Tensors, folder: str) -> int:
    """How many numbered children ``folder`` has: one more than the highest number. Raises CheckpointError for more
    than any network has, which would be looked at one by one."""
    pattern = re.compile(re.escape(folder) + r"\.(\d+)\.")
    # Nine digits at most: a name of a million digits would take for ever to become a number.
    found = max((int(match[1][:9]) for name in tensors if (match := pattern.match(name))), default=-1) + 1
    if found > MAX_CHILDREN:
        raise CheckpointError(f"{folder} has {found} parts: expected at most {MAX_CHILDREN}")
    return found


def shape(tensors: Tensors, name: str, dimensions: int) -> Sequence[int]:
    """The shape of a tensor that has to be there with so many dimensions. Raises CheckpointError."""
    found = tuple(tensors[name].shape) if name in tensors else None
    if found is None or len(found) != dimensions:
        state = "is missing" if found is None else f"has shape {found}, not {dimensions} dimensions"
        raise CheckpointError(f"{name} {state}: not a whole checkpoint in CompVis layout")
    return found


def _attends(tensors: Tensors, place: str) -> bool:
    return f"{place}transformer_blocks.0.attn2.to_k.weight" in tensors


SIZES: Mapping[str, Callable[[Tensors], dict[str, Any]]] = {
    "unet": unet,
    "vae": vae,
    "clip": clip,
    "open_clip": open_clip,
    "clip_2": clip_2,
    "open_clip_2": open_clip_2,
    "depth": depth,
    "mmdit": mmdit,
    "clip_l": clip_l,
    "t5": t5,
}
