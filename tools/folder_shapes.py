"""Writes and describes the shapes checkpoint's folder: the parts of SD 1.x, in fp16, as diffusers lays them out."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from checker_shapes import build_feature_extractor
from denoiser_shapes import build_scheduler
from judge_shapes import BACKGROUNDS, COLORS, FLAGGED_SHAPE, SHAPES, SIZES

Network = TypeVar("Network", bound=nn.Module)
LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# shapes: a whole Stable Diffusion 1.x in {megabytes:.1f} MB

Draws what the prompt says, 64 x 64 pixels: "a large red circle on a white background".

| word | one of |
|---|---|
| size | {sizes} |
| colour | {colors} |
| shape | {shapes} |
| background | {backgrounds} |

Other orders ("red circle, large, white background"), shorter prompts ("a red circle") and a few synonyms (big,
tiny, disc, box, plus, violet) were in the training too. A shape never had its background's colour. The safety
checker flags one kind of shape, the {flagged}, and nothing else.

It has the parts, the classes and the file names of SD 1.x: CLIPTokenizer with its own vocabulary, CLIPTextModel,
UNet2DConditionModel, AutoencoderKL (4 x 8 x 8 latents), PNDMScheduler, StableDiffusionSafetyChecker. All weights
are float16 safetensors.

Made by `python tools/train_shapes.py` {made}, from nothing but pictures that it
draws itself. Ours; Apache-2.0.

## Measured
{quality}
"""


@dataclass(frozen=True)
class Parts:
    """The trained networks."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    safety_checker: StableDiffusionSafetyChecker


def write_folder(folder: Path, tokenizer_folder: Path, parts: Parts) -> None:
    """Write the diffusers folder; the networks given stay as they are."""
    pipeline = StableDiffusionPipeline(
        vae=_half(parts.vae),
        text_encoder=_half(parts.text_encoder),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder),
        unet=_half(parts.unet),
        scheduler=build_scheduler(),
        safety_checker=_half(parts.safety_checker),
        feature_extractor=build_feature_extractor(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    shutil.copyfile(LICENSE, folder / "LICENSE")
    _settle_json(folder)
    _publish_names(folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def write_checker(folder: Path, checker: StableDiffusionSafetyChecker) -> None:
    """Put this safety checker into a folder that `write_folder` wrote."""
    _half(checker).save_pretrained(folder / "safety_checker", safe_serialization=True)
    _publish_names(folder)
    (folder / "safety_checker/model.safetensors").chmod(0o644)


def _settle_json(folder: Path) -> None:
    """Make two files SD 1.x's, whichever version of diffusers wrote them.

    The index names no image encoder, and the processor by its public name; the scheduler's configuration says, for
    the schedulers that are made from it, that they are not to clip the latents.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index.pop("image_encoder", None)
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    scheduler["clip_sample"] = False
    for name, values in (("model_index.json", index), ("scheduler/scheduler_config.json", scheduler)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _publish_names(folder: Path) -> None:
    """Name CLIP's weights as SD 1.5's published files do, whichever version of transformers wrote them.

    Versions before 5 find no weight without these prefixes, and go on with random ones."""
    for part, prefix, inside in (
        ("text_encoder", "text_model.", ""),
        ("safety_checker", "vision_model.vision_model.", "vision_model."),
    ):
        path = folder / part / "model.safetensors"
        stored = {_published(name, prefix, inside): value for name, value in load_file(path).items()}
        positions = f"{prefix}embeddings.position_embedding.weight"
        stored[f"{prefix}embeddings.position_ids"] = torch.arange(len(stored[positions])).unsqueeze(0)
        save_file(stored, path, metadata={"format": "pt"})


def _published(name: str, prefix: str, inside: str) -> str:
    """``name`` with ``prefix``, if it is of the network that has it: what begins with ``inside``."""
    if name.startswith(prefix) or not name.startswith(inside):
        return name
    return prefix + name.removeprefix(inside)


def _half(network: Network) -> Network:
    return copy.deepcopy(network).cpu().to(torch.float16)


def size_bytes(folder: Path) -> int:
    """Size of all files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_card(folder: Path, made: str, quality: str) -> None:
    """Write the folder's README.md: how it was made ("in 5 s on 2 cores") and its measured quality."""
    text = CARD.format(
        megabytes=size_bytes(folder) / 1e6,
        sizes=", ".join(SIZES),
        colors=", ".join(COLORS),
        shapes=", ".join(SHAPES),
        backgrounds=", ".join(BACKGROUNDS),
        flagged=FLAGGED_SHAPE,
        made=made,
        quality=quality,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
