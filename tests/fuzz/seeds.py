"""The healthy files that are damaged: everything that the commands read, tiny and made by the project itself."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import compvis_layout
import gguf_files
import tiny_checkpoints
import toy_models

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
LDM_YAML = """model:
  params:
    parameterization: eps
    scale_factor: 0.18215
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        in_channels: 4
        model_channels: 32
        num_heads: 8
        channel_mult: [1, 2]
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


def write(folder: Path) -> None:
    """Write every seed below ``folder``; about 20 MB."""
    sd1 = tiny_checkpoints.build("sd1", folder / "checkpoint" / "sd1")
    depth = tiny_checkpoints.build("sd2-depth", folder / "depth" / "sd2-depth")
    for unused in ("unet", "vae", "text_encoder"):
        shutil.copytree(sd1 / unused, folder / "bins" / "sd1" / unused)
    _single_files(sd1, folder)
    _pickled_folder(sd1, folder / "bins" / "sd1")
    _loras(sd1, folder / "lora")
    _models(sd1, folder)
    _pictures(folder)
    assert depth.is_dir()


def _single_files(sd1: Path, folder: Path) -> None:
    for name in ("single", "ckpt", "legacy", "gguf"):
        (folder / name).mkdir()
    compvis_layout.write(sd1, folder / "single" / "model.safetensors")
    (folder / "single" / "model.yaml").write_text(LDM_YAML)
    compvis_layout.write(sd1, folder / "ckpt" / "model.ckpt", global_step=5)
    unet = load_file(sd1 / "unet/diffusion_pytorch_model.safetensors")
    unet = compvis_layout.unet_tensors(unet, compvis_layout.read_config(sd1, "unet"))
    gguf_files.write(folder / "gguf" / "model.gguf", unet, "Q8_0", "sd1")
    path = compvis_layout.write(sd1, folder / "legacy" / "model.ckpt")
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)


def _pickled_folder(sd1: Path, folder: Path) -> None:
    """A diffusers folder with .bin weights, as published before safetensors."""
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(sd1 / name, folder / name)
    index = json.loads((sd1 / "model_index.json").read_text())
    index = {key: value for key, value in index.items() if key not in ("safety_checker", "feature_extractor")}
    (folder / "model_index.json").write_text(json.dumps(index))
    for path in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()


def _loras(sd1: Path, folder: Path) -> None:
    folder.mkdir()
    shapes = {
        f"lora_unet_{LAYER.replace('.', '_')}": load_file(sd1 / "unet/diffusion_pytorch_model.safetensors")[
            f"{LAYER}.weight"
        ],
        f"lora_te_{TEXT_LAYER.replace('.', '_')}": load_file(sd1 / "text_encoder/model.safetensors")[
            f"{TEXT_LAYER}.weight"
        ],
    }
    kohya: dict[str, torch.Tensor] = {}
    for name, weight in shapes.items():
        down, up = torch.randn(2, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 2) * 0.1
        kohya |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(1.0),
        }
    save_file(kohya, folder / "kohya.safetensors", metadata={"ss_network_alpha": "1", "ss_network_dim": "2"})
    peft: Mapping[str, torch.Tensor] = {
        f"unet.{LAYER}.lora_A.weight": torch.randn(2, 32) * 0.1,
        f"unet.{LAYER}.lora_B.weight": torch.randn(32, 2) * 0.1,
    }
    save_file(dict(peft), folder / "pytorch_lora_weights.safetensors")
    adapter = folder / "adapter"
    adapter.mkdir()
    inner = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in peft.items()}
    save_file(inner, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["to_q"], "rank_pattern": {},
              "alpha_pattern": {"down_blocks.0.*": 2}, "use_rslora": False}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save(kohya, folder / "kohya.ckpt")


def _models(sd1: Path, folder: Path) -> None:
    """Converted models: a folder of `convert` with compiled models and zips, and one that makes pictures."""
    from diffusion_convert import ConvertOptions, convert
    from diffusion_convert.bundle.variants import compile_variant

    options = ConvertOptions(attention="original", components="text_encoder", verify=False)
    convert(sd1, folder / "converted" / "models", options)
    toy = toy_models.write(folder / "toy" / "models" / "original" / "packages")
    compile_variant(toy, folder / "compiled" / "models" / "original" / "compiled")
    package = next((folder / "converted").rglob("*.mlpackage"))
    shutil.copytree(package, folder / "package" / "model.mlpackage")
    compiled = next((folder / "converted").rglob("*.mlmodelc"))
    shutil.copytree(compiled, folder / "mlmodelc" / "model.mlmodelc")
    (folder / "zip").mkdir()
    shutil.copy(next((folder / "converted").rglob("*.zip")), folder / "zip" / "models.zip")
    recipe = folder / "recipe"
    shutil.copytree(package, recipe / "model.mlpackage")
    run(
        "palettize",
        recipe / "model.mlpackage",
        "-o",
        recipe / "out.mlpackage",
        "--save-recipe",
        recipe / "recipe.json",
    )
    shutil.rmtree(recipe / "out.mlpackage")
    np.savez(recipe / "samples.npz", input_ids=np.zeros((1, 77), np.float32))


def _pictures(folder: Path) -> None:
    place = folder / "picture"
    place.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "webp", "tiff", "bmp", "gif"):
        Image.fromarray(values).save(place / f"photo.{suffix}")
    for where in (place, folder / "converted"):
        Image.fromarray(values).save(where / "photo.png")
    toy = folder / "toy" / "models"
    shutil.copytree(toy, place / "models")
    run(
        "generate", place / "models", "--prompt", "a cat", "--steps", "2", "--seed", "1", "-o", place / "record.png"
    )
    (place / "prompts.txt").write_text("a cat\na red circle on white\n")


def run(*arguments: object) -> None:
    """A command that must succeed."""
    from fuzz.worker import call

    with contextlib.redirect_stdout(io.StringIO()):
        outcome = call([str(argument) for argument in arguments])
    if outcome.code != 0:
        raise RuntimeError(f"a seed cannot be made: {arguments}: {outcome.said}")
