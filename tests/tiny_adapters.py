"""Tiny random IP-Adapters and T2I-Adapters, in the files that are published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ENCODER: Mapping[str, Any] = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 40,
    "image_size": 32,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 8,
    "projection_dim": 24,
}
HIDDEN, HEADS, TOKENS = 48, 2, 6
"""Of a resampler; published ones have 768 or 1280, 12 or 20, and 16. A head has 64 channels in all."""


def write_encoder(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPVisionConfig(**{k: v for k, v in ENCODER.items() if k not in ("architectures", "model_type")})
        model = CLIPVisionModelWithProjection(config)
        # Made larger: as initialised, all pictures are about the same to it.
        tensors = {name: (8 * value if value.ndim > 1 else value) for name, value in model.state_dict().items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ENCODER), encoding="utf-8")
    stored = {name: value.half().contiguous() for name, value in tensors.items() if "position_ids" not in name}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_ip_adapter(path: Path, checkpoint: Path, kind: str = "plain", seed: int = 0) -> Path:
    """An adapter ("plain", "plus", "full") for the UNet of a tiny checkpoint; ``.bin`` as torch pickles it."""
    from diffusers import UNet2DConditionModel

    config = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    width = int(config["cross_attention_dim"])
    random = torch.Generator().manual_seed(seed)
    places = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    keys = {
        f"{2 * number + 1}.{name}.weight": _matrix(random, unet.get_submodule(place).to_k.out_features, width, 2.0)
        for number, place in enumerate(places)
        for name in ("to_k_ip", "to_v_ip")
    }
    projection = {"plain": _plain, "plus": _plus, "full": _full}[kind](random, width)
    parts = {"image_proj": projection, "ip_adapter": keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bin":
        torch.save(parts, path)
    else:
        save_file({f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}, path)
    return path


def _matrix(random: torch.Generator, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
    values: torch.Tensor = gain * torch.randn(rows, columns, generator=random) / columns**0.5
    return values.half()


def _vector(random: torch.Generator, size: int, around: float = 0.0) -> torch.Tensor:
    return (around + 0.1 * torch.randn(size, generator=random)).half()


def _norm(random: torch.Generator, name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": _vector(random, width, 1.0), f"{name}.bias": _vector(random, width)}


def _plain(random: torch.Generator, width: int) -> dict[str, torch.Tensor]:
    embed = ENCODER["projection_dim"]
    return {
        "proj.weight": _matrix(random, 4 * width, embed),
        "proj.bias": _vector(random, 4 * width),
        **_norm(random, "norm", width),
    }


def _full(random: torch.Generator, width: int) -> dict[str, torch.Tensor]:
    embed = ENCODER["hidden_size"]
    return {
        "proj.0.weight": _matrix(random, embed, embed),
        "proj.0.bias": _vector(random, embed),
        "proj.2.weight": _matrix(random, width, embed),
        "proj.2.bias": _vector(random, width),
        **_norm(random, "proj.3", width),
    }


def _plus(random: torch.Generator, width: int) -> dict[str, torch.Tensor]:
    inner = 64 * HEADS
    found = {
        "latents": torch.randn(1, TOKENS, HIDDEN, generator=random).half(),
        "proj_in.weight": _matrix(random, HIDDEN, ENCODER["hidden_size"]),
        "proj_in.bias": _vector(random, HIDDEN),
        "proj_out.weight": _matrix(random, width, HIDDEN),
        "proj_out.bias": _vector(random, width),
        **_norm(random, "norm_out", width),
    }
    for layer in range(4):
        at = f"layers.{layer}"
        found |= {
            **_norm(random, f"{at}.0.norm1", HIDDEN),
            **_norm(random, f"{at}.0.norm2", HIDDEN),
            f"{at}.0.to_q.weight": _matrix(random, inner, HIDDEN),
            f"{at}.0.to_kv.weight": _matrix(random, 2 * inner, HIDDEN),
            f"{at}.0.to_out.weight": _matrix(random, HIDDEN, inner),
            **_norm(random, f"{at}.1.0", HIDDEN),
            f"{at}.1.1.weight": _matrix(random, 4 * HIDDEN, HIDDEN),
            f"{at}.1.3.weight": _matrix(random, HIDDEN, 4 * HIDDEN),
        }
    return found


def write_t2i_adapter(
    folder: Path, channels: list[int], kind: str = "full_adapter", seed: int = 0, layers: int = 1
) -> Path:
    """diffusers' folder of a T2IAdapter ("full_adapter", "light_adapter", "full_adapter_xl") of ``layers`` a level;
    a light one takes grey pictures."""
    from diffusers import T2IAdapter

    config = {
        "_class_name": "T2IAdapter",
        "_diffusers_version": "0.17.0.dev0",
        "adapter_type": kind,
        "channels": channels,
        "downscale_factor": 16 if kind == "full_adapter_xl" else 8,
        "in_channels": 1 if kind == "light_adapter" else 3,
        "num_res_blocks": layers,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors = T2IAdapter.from_config(config).state_dict()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = {name: (3 * value).half().contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder
