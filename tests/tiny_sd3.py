"""Tiny random checkpoints of Stable Diffusion 3: published configurations' keys, with widths and depths shrunk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compvis_layout import vae_tensors
from tiny_checkpoints import (
    SD1_TEXT,
    SDXL_TEXT_2,
    VAE,
    WORDS,
    Recipe,
    _write_diffusers,
    _write_json,
    _write_text,
    _write_weights,
)

TRANSFORMER: Mapping[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 8,
    "caption_projection_dim": 32,
    "in_channels": 16,
    "joint_attention_dim": 96,  # wider than both CLIPs' states together, as T5's
    "num_attention_heads": 4,
    "num_layers": 3,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 56,
    "pos_embed_max_size": 12,
    "sample_size": 8,
}
TRANSFORMER_35: Mapping[str, Any] = {
    **TRANSFORMER,
    "_diffusers_version": "0.31.0.dev0",
    "dual_attention_layers": [0, 1],
    "pos_embed_max_size": 24,
    "qk_norm": "rms_norm",
}
CLIP: Mapping[str, Any] = {**SD1_TEXT, "architectures": ["CLIPTextModelWithProjection"]}
SD3_VAE: Mapping[str, Any] = {
    **VAE,
    "_diffusers_version": "0.29.0.dev0",
    "force_upcast": True,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
FLOW: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
FLOW_DYNAMIC: Mapping[str, Any] = {
    **FLOW,
    "_diffusers_version": "0.31.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "use_dynamic_shifting": True,
}
T5: Mapping[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 96,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 16,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": False,
    "use_cache": True,
}
KINDS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "sd3": (TRANSFORMER, FLOW),
    "sd3.5": (TRANSFORMER_35, FLOW_DYNAMIC),
}


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of ``kind`` ("sd3", "sd3.5") into ``folder``, as
    `StableDiffusion3Pipeline.save_pretrained` would; the same seed, the same bytes. Returns ``folder``."""
    network, scheduler = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _write_diffusers(folder / "transformer", "SD3Transformer2DModel", network)
        _write_diffusers(folder / "vae", "AutoencoderKL", SD3_VAE)
        index = _write_text(folder, Recipe(text=CLIP, text_2=SDXL_TEXT_2))
        index |= _write_t5(folder)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusion3Pipeline",
            "_diffusers_version": "0.29.0.dev0",
            **index,
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        },
    )
    return folder


def _write_t5(folder: Path) -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel

    config = {**T5, "vocab_size": write_t5_tokenizer(folder / "tokenizer_3")}
    model = T5EncoderModel(T5Config(**{name: value for name, value in config.items() if name != "architectures"}))
    tensors = model.state_dict()
    del tensors["encoder.embed_tokens.weight"]  # one tensor, which files hold once
    _write_json(folder / "text_encoder_3" / "config.json", config)
    _write_weights(folder / "text_encoder_3" / "model.safetensors", tensors)
    return {
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
    }


def write_t5_tokenizer(folder: Path) -> int:
    """A T5 tokenizer of `WORDS` and ASCII's letters; returns its vocabulary's size."""
    from transformers import T5Tokenizer

    words = [(f"\u2581{word}", -2.0 - number / 8) for number, word in enumerate(WORDS)]
    letters = [(chr(code), -9.0 - code / 64) for code in range(0x21, 0x7F)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=4)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_file(folder: Path, path: Path, encoders: tuple[str, ...] = ("clip_l", "clip_g", "t5xxl")) -> Path:
    """The checkpoint of ``folder`` as Stability AI publishes it, in one file with those text ``encoders``, its
    tokenizers beside it, and what tiny shapes do not show in ``STEM.config.json``."""
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    networks = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    own = {
        f"model.diffusion_model.{name}": value for name, value in _mmdit(_weights(folder, "transformer"), config)
    }
    vae = {f"first_stage_model.{name}": value for name, value in vae_tensors(_weights(folder, "vae")).items()}
    text = {
        f"text_encoders.{name}.transformer.{inner}": value
        for name in encoders
        for inner, value in _weights(folder, networks[name]).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in {**own, **vae, **text}.items()}, path)
    for tokenizer in folder.glob("tokenizer*"):
        shutil.copytree(tokenizer, path.parent / tokenizer.name, dirs_exist_ok=True)
    not_in_shapes = {
        "transformer": {key: config[key] for key in ("attention_head_dim", "num_attention_heads", "sample_size")},
        "text_encoder": {"num_attention_heads": CLIP["num_attention_heads"]},
        "text_encoder_2": {"num_attention_heads": SDXL_TEXT_2["num_attention_heads"]},
        "text_encoder_3": {"relative_attention_max_distance": T5["relative_attention_max_distance"]},
    }
    path.with_suffix(".config.json").write_text(json.dumps(not_in_shapes), encoding="utf-8")
    return path


def _weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(next((folder / part).glob("*.safetensors")))
    return tensors


RULES = (
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear\.", r"joint_blocks.\1.context_block.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.", r"joint_blocks.\1.context_block.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2\.", r"joint_blocks.\1.context_block.mlp.fc2."),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"joint_blocks.\1.context_block.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.", r"joint_blocks.\1.context_block.attn.ln_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj\.", r"joint_blocks.\1.context_block.attn.\2."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"joint_blocks.\1.x_block.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"joint_blocks.\1.x_block.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"joint_blocks.\1.x_block.mlp.fc2."),
    (r"^transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0\.", r"joint_blocks.\1.x_block.\2.proj."),
    (r"^transformer_blocks\.(\d+)\.(attn2?)\.norm_(q|k)\.", r"joint_blocks.\1.x_block.\2.ln_\3."),
    (r"^transformer_blocks\.(\d+)\.(attn2?)\.to_(q|k|v)\.", r"joint_blocks.\1.x_block.\2.\3."),
)


def _mmdit(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Stability AI's names: queries, keys and values in one tensor, shift before scale where no gates follow."""
    last = f"joint_blocks.{config['num_layers'] - 1}.context_block.adaLN_modulation.1."
    renamed = {}
    for name, value in tensors.items():
        found = name
        for pattern, replacement in RULES:
            found = re.sub(pattern, replacement, found)
        if found.startswith(("final_layer.adaLN_modulation.1.", last)):
            scale, shift = value.chunk(2)
            renamed[found] = torch.cat([shift, scale])
        else:
            renamed[found] = value
    for name, value in renamed.items():
        head, dot, kind = name.rpartition(".q.")
        if dot:
            yield f"{head}.qkv.{kind}", torch.cat([renamed[f"{head}.{part}.{kind}"] for part in "qkv"])
        elif (
            ".attn.k." not in name
            and ".attn.v." not in name
            and ".attn2.k." not in name
            and ".attn2.v." not in name
        ):
            yield name, value
