"""Checkpoints of the published sizes with random weights, where none may be downloaded.

python benchmarks/full_size_checkpoint.py FOLDER [--family sdxl]        2.7 GB for sd1, 7.0 GB for sdxl
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_checkpoints

SHARD_BYTES = 2_000_000_000
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model", "model"

VAE: Mapping[str, Any] = {
    **tiny_checkpoints.VAE,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}
SD1_UNET: Mapping[str, Any] = {
    **tiny_checkpoints.SD1_UNET,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL_UNET: Mapping[str, Any] = {
    **tiny_checkpoints.SDXL_UNET,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
}
CLIP: Mapping[str, Any] = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "num_hidden_layers": 12}
TEXT: Mapping[str, Any] = {
    **CLIP,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
TEXT_2: Mapping[str, Any] = {
    **TEXT,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SAFETY: Mapping[str, Any] = {
    "projection_dim": 768,
    "text_config": {},
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
SCHEDULER: Mapping[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Network:
    """One part of a checkpoint: the class that model_index.json names, its configuration, its file's stem."""

    library: str
    class_name: str
    config: Mapping[str, Any]
    file: str


@dataclass(frozen=True)
class Family:
    """What `write_checkpoint` writes."""

    pipeline: str
    scheduler: str
    networks: Mapping[str, Network]


CLIP_TEXT = Network("transformers", "CLIPTextModel", TEXT, TRANSFORMERS_FILE)
FAMILIES: Mapping[str, Family] = {
    "sd1": Family(
        "StableDiffusionPipeline",
        "PNDMScheduler",
        {
            "unet": Network("diffusers", "UNet2DConditionModel", SD1_UNET, DIFFUSERS_FILE),
            "vae": Network("diffusers", "AutoencoderKL", VAE, DIFFUSERS_FILE),
            "text_encoder": CLIP_TEXT,
            "safety_checker": Network(
                "stable_diffusion", "StableDiffusionSafetyChecker", SAFETY, TRANSFORMERS_FILE
            ),
        },
    ),
    "sdxl": Family(
        "StableDiffusionXLPipeline",
        "EulerDiscreteScheduler",
        {
            "unet": Network("diffusers", "UNet2DConditionModel", SDXL_UNET, DIFFUSERS_FILE),
            "vae": Network(
                "diffusers",
                "AutoencoderKL",
                {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
                DIFFUSERS_FILE,
            ),
            "text_encoder": CLIP_TEXT,
            "text_encoder_2": Network("transformers", "CLIPTextModelWithProjection", TEXT_2, TRANSFORMERS_FILE),
        },
    ),
}


def write_checkpoint(folder: Path, family: str = "sd1") -> Path:
    """A diffusers folder, made once; weights are normal with variance 1 / (3 fan-in), norms 1, biases 0."""
    from diffusion_convert.checkpoint import torch_networks
    from diffusion_convert.checkpoint.model import Submodel

    if (folder / "model_index.json").exists():
        return folder
    chosen = FAMILIES[family]
    index: dict[str, list[str]] = {"scheduler": ["diffusers", chosen.scheduler]}
    for name, about in chosen.networks.items():
        network = torch_networks.empty(Submodel(about.class_name, about.config, dict, ()), name)
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        write_shards(folder / name, about.file, shapes)
        (folder / name / "config.json").write_text(json.dumps(about.config))
        index[name] = [about.library, about.class_name]
        if name.startswith("text_encoder"):
            number = name.removeprefix("text_encoder")
            tiny_checkpoints.write_tokenizer(folder / f"tokenizer{number}", "!" if number else "<|endoftext|>")
            index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": chosen.scheduler, **SCHEDULER}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": chosen.pipeline, **index}))
    return folder


def write_shards(folder: Path, stem: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Random float16 tensors in files of at most `SHARD_BYTES`, with an index where they are several."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(shapes))
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}" if len(shards) > 1 else stem
        write_safetensors(folder / f"{name}.safetensors", shard, seed=number)
        places |= dict.fromkeys(shard, f"{name}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and sum(map(_bytes, shard.values())) + _bytes(shape) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    """Random float16 tensors, one in memory at a time: the format is a length, a JSON header and the bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(random_weight(name, shape, generator).numpy().data)


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One tensor."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0, dtype=torch.float16)
    deviation = 1 / math.sqrt(3 * math.prod(shape[1:]))
    return torch.randn(shape, generator=generator).mul_(deviation).half()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    options = parser.parse_args()
    print(write_checkpoint(options.folder, options.family))
