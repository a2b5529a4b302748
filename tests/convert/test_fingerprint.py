"""Other files, another conversion: what a checkpoint was read from is in its fingerprint, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.identity import fingerprint
from diffusion_convert.option_values import Lora
from diffusion_convert.options import ConvertOptions

READ = (
    "checkpoint/unet/diffusion_pytorch_model.safetensors",
    "checkpoint/text_encoder/model.safetensors",
    "checkpoint/tokenizer/merges.txt",
    "vae/diffusion_pytorch_model.safetensors",
    "lora/adapter_model.safetensors",
    "lora/adapter_config.json",
)
NOT_READ = ("checkpoint/vae/diffusion_pytorch_model.safetensors", "checkpoint/unet/notes.json", "lora/notes.json")


@pytest.fixture
def place(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint, another VAE, and a LoRA as peft saves it."""
    shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "checkpoint")
    shutil.copytree(tmp_path / "checkpoint" / "vae", tmp_path / "vae")
    lora = tmp_path / "lora"
    lora.mkdir()
    layer = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    save_file(parts, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "peft_type": "LORA"}))
    for name in NOT_READ[1:]:
        (tmp_path / name).write_text("{}")
    return tmp_path


def of(place: Path) -> str:
    options = ConvertOptions(vae=place / "vae", loras=(Lora(place / "lora"),))
    opened = open_checkpoint(str(place / "checkpoint"), ConvertOptions(vae=options.vae, loras=options.loras))
    return fingerprint(opened, options)


@pytest.mark.parametrize("name", READ + NOT_READ)
def test_another_time_of_change_is_another_conversion_where_the_file_is_read(place: Path, name: str) -> None:
    before = of(place)
    assert of(place) == before
    os.utime(place / name, ns=(0, 0))
    assert (of(place) != before) == (name in READ)


def test_other_contents_of_the_same_size_and_time_are_another_conversion(place: Path) -> None:
    before, weights = of(place), place / READ[0]
    status, contents = weights.stat(), weights.read_bytes()
    weights.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_mtime_ns == status.st_mtime_ns
    assert of(place) != before


def test_another_setting_of_the_pipeline_is_another_conversion(place: Path) -> None:
    before, index = of(place), place / "checkpoint" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": True}))
    assert of(place) != before
