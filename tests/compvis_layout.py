"""Writes a diffusers folder as the one file in CompVis (LDM) layout that it would have come from.

Written from the layout's own naming, independently of diffusers' mapping, whose inverse it is. What the published
files carry beside the weights (schedules, averaged copies, OpenCLIP's unused last block) is there too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

RESNET: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
VAE_INNER: Rules = (
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_(q|k|v)\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.", ".down."),
)
OPEN_CLIP: Rules = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
DEPTH: Rules = (
    (
        r"^dpt\.embeddings\.backbone\.bit\.embedder\.convolution\.",
        "pretrained.model.patch_embed.backbone.stem.conv.",
    ),
    (r"^dpt\.embeddings\.backbone\.bit\.embedder\.norm\.", "pretrained.model.patch_embed.backbone.stem.norm."),
    (
        r"^dpt\.embeddings\.backbone\.bit\.encoder\.stages\.(\d+)\.layers\.",
        r"pretrained.model.patch_embed.backbone.stages.\1.blocks.",
    ),
    (r"^dpt\.embeddings\.projection\.", "pretrained.model.patch_embed.proj."),
    (r"^dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
    (r"^dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
    (r"^dpt\.layernorm\.", "pretrained.model.norm."),
    (r"^dpt\.encoder\.layer\.", "pretrained.model.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (
        r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0\.",
        lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.0.project.0.",
    ),
    (
        r"^neck\.reassemble_stage\.layers\.(\d)\.projection\.",
        lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.3.",
    ),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.resize\.", lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.4."),
    (r"^neck\.convs\.(\d)\.", lambda m: f"scratch.layer{int(m[1]) + 1}_rn."),
    (r"^neck\.fusion_stage\.layers\.(\d)\.projection\.", lambda m: f"scratch.refinenet{4 - int(m[1])}.out_conv."),
    (
        r"^neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.convolution(\d)\.",
        lambda m: f"scratch.refinenet{4 - int(m[1])}.resConfUnit{m[2]}.conv{m[3]}.",
    ),
    (r"^head\.head\.", "scratch.output_conv."),
)


NOT_IN_SHAPES = ("attention_head_dim", "num_attention_heads", "addition_time_embed_dim")


def write(folder: Path, path: Path, **beside_state_dict: Any) -> Path:
    """A diffusers folder's checkpoint as one file, .safetensors or .ckpt by ``path``'s name, with its tokenizer
    beside it and its head counts in ``STEM.config.json``: tiny models are too narrow for the families' rules."""
    tensors = to_compvis(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, **beside_state_dict}, path)
    for tokenizer in folder.glob("tokenizer*"):
        shutil.copytree(tokenizer, path.parent / tokenizer.name, dirs_exist_ok=True)
    heads = {
        subfolder: {key: config[key] for key in NOT_IN_SHAPES if config.get(key) is not None}
        for subfolder in ("unet", "text_encoder", "text_encoder_2", "depth_estimator")
        if (config := read_config(folder, subfolder))
    }
    path.with_suffix(".config.json").write_text(json.dumps(heads))
    return path


def to_compvis(folder: Path) -> Tensors:
    """All tensors of the file that the folder would have come from."""
    config = read_config(folder, "unet")
    unet = prefixed("model.diffusion_model.", unet_tensors(read_weights(folder, "unet"), config))
    tensors = {**unet, **prefixed("first_stage_model.", vae_tensors(read_weights(folder, "vae")))}
    if (folder / "text_encoder_2").is_dir():
        tensors |= sgm_text_tensors(folder)
    elif read_config(folder, "text_encoder")["hidden_act"] == "gelu":
        text = read_weights(folder, "text_encoder")
        tensors |= prefixed("cond_stage_model.model.", open_clip_tensors(text, unused_block=True))
    else:
        text = read_weights(folder, "text_encoder")
        text["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
        tensors |= prefixed("cond_stage_model.transformer.", text)
    if (folder / "depth_estimator").is_dir():
        tensors |= prefixed("depth_model.model.", depth_tensors(read_weights(folder, "depth_estimator")))
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
        for name, value in unet.items()
        if value.ndim == 1
    }
    return tensors | averaged | {"betas": torch.linspace(0, 1, 1000), "model_ema.num_updates": torch.tensor(3)}


def sgm_text_tensors(folder: Path) -> Tensors:
    """Stable Diffusion XL's encoders: OpenCLIP's has all its blocks and is used with its projection; the refiner
    has no other."""
    second = prefixed(".model.", open_clip_tensors(read_weights(folder, "text_encoder_2")))
    if not (folder / "text_encoder").is_dir():
        return prefixed("conditioner.embedders.0", second)
    first = read_weights(folder, "text_encoder")
    first["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    return prefixed("conditioner.embedders.0.transformer.", first) | prefixed("conditioner.embedders.1", second)


def unet_tensors(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """UNet2DConditionModel's tensors by LDM's names: blocks are numbered through, samplers have numbers too."""
    step = config["layers_per_block"] + 1
    up_types = config["up_block_types"]
    rules: Rules = (
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^time_embedding\.cond_proj\.", "time_embed.cond_proj."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^class_embedding\.", "label_emb."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"input_blocks.{int(m[1]) * step + int(m[2]) + 1}.0."),
        (
            r"^down_blocks\.(\d+)\.attentions\.(\d+)\.",
            lambda m: f"input_blocks.{int(m[1]) * step + int(m[2]) + 1}.1.",
        ),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.", lambda m: f"input_blocks.{(int(m[1]) + 1) * step}.0.op."),
        (r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"output_blocks.{int(m[1]) * step + int(m[2])}.0."),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)\.", lambda m: f"output_blocks.{int(m[1]) * step + int(m[2])}.1."),
        (
            r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.",
            lambda m: (
                f"output_blocks.{(int(m[1]) + 1) * step - 1}."
                f"{2 if up_types[int(m[1])] == 'CrossAttnUpBlock2D' else 1}.conv."
            ),
        ),
    )
    return {
        renamed(name, rules if ".resnets." not in name else (*rules, *RESNET)): value
        for name, value in tensors.items()
    }


def vae_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """AutoencoderKL's tensors by LDM's names. The decoder counts from the finest level; attention is convolved."""
    levels = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    rules: Rules = (
        (r"\.up_blocks\.(\d+)\.resnets\.", lambda m: f".up.{levels - 1 - int(m[1])}.block."),
        (r"\.up_blocks\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}."),
        *VAE_INNER,
    )
    written = {renamed(name, rules): value for name, value in tensors.items()}
    return {
        name: value[:, :, None, None].contiguous() if ".attn_1." in name and value.ndim == 2 else value
        for name, value in written.items()
    }


def open_clip_tensors(tensors: Mapping[str, torch.Tensor], unused_block: bool = False) -> Tensors:
    """CLIPTextModel's tensors by OpenCLIP's names, the projections joined; a matrix in place of the last linear
    layer, made up where there is none; and a last block that is not used."""
    joined: Tensors = {}
    for name, value in tensors.items():
        place = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)
        if place:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            joined[f"transformer.resblocks.{place[1]}.attn.in_proj_{place[2]}"] = torch.cat(parts)
        elif name != "text_projection.weight" and not re.search(r"\.[kv]_proj\.", name):
            joined[renamed(name, OPEN_CLIP)] = value
    width = joined["positional_embedding"].shape[1]
    projection = (
        tensors["text_projection.weight"].T if "text_projection.weight" in tensors else torch.randn(width, width)
    )
    joined |= {"text_projection": projection.contiguous(), "logit_scale": torch.tensor(4.6)}
    if not unused_block:
        return joined
    last = 1 + max(int(m[1]) for name in joined if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name)))
    unused = {
        name.replace("resblocks.0.", f"resblocks.{last}."): value + 1
        for name, value in joined.items()
        if "resblocks.0." in name
    }
    return joined | unused


def depth_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """DPTForDepthEstimation's tensors by MiDaS' names, query, key and value joined, with its unused classifier."""
    joined: Tensors = {}
    for name, value in tensors.items():
        place = re.fullmatch(r"dpt\.encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)", name)
        if place:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            joined[f"pretrained.model.blocks.{place[1]}.attn.qkv.{place[2]}"] = torch.cat(parts)
        elif ".attention.attention." not in name:
            joined[renamed(name, DEPTH)] = value
    return joined | {
        "pretrained.model.head.weight": torch.ones(10, 32),
        "pretrained.model.head.bias": torch.ones(10),
    }


def renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def read_weights(folder: Path, subfolder: str) -> Tensors:
    (path,) = (folder / subfolder).glob("*.safetensors")
    return dict(load_file(path))


def read_config(folder: Path, subfolder: str) -> dict[str, Any]:
    path = folder / subfolder / "config.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}
