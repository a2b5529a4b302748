"""Prompts and encoders longer than CLIP's 77 tokens, from the checkpoint to the picture, against diffusers."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.bundle.model_card import model_card
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.verification.folder import verify_models
from diffusion_runtime import load_pipeline
from diffusion_runtime.errors import InputError
from diffusion_runtime.pipeline import Pipeline, RuntimeNote

pytestmark = pytest.mark.usefixtures("loaded_once")

PARITY_DB = 35.0
WORDS = ["cat", "horse", "red", "circle", "white"]
LONG = " ".join(WORDS[index % 5] for index in range(100))
PLAIN: dict[str, Any] = {"attention": "split_einsum_v2", "compiled": False, "zip": False}


def shapes(models: Path) -> dict[str, tuple[int, ...]]:
    manifest = load_pipeline(models, "torch").manifest
    return {tensor.name: tensor.shape for part in manifest.components.values() for tensor in part.inputs}


def picture_of(pipeline: Pipeline, prompt: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeNote)
        return np.asarray(pipeline(prompt, seed=3, num_inference_steps=4).images[0])


def diffusers_pipeline(folder: Path) -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        str(folder), local_files_only=True, safety_checker=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    error = float(np.mean((first.astype(float) - second) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a safety checker."""
    copy = shutil.copytree(tiny_checkpoint("sd1"), tmp_path_factory.mktemp("long") / "checkpoint")
    shutil.rmtree(copy / "safety_checker")
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "models"
    convert(folder, output, ConvertOptions(**PLAIN, context_length=154))
    return output


@pytest.mark.parametrize("prompt", [LONG, "a red cat", "", " ".join(["cat"] * 75), " ".join(["cat"] * 76)])
def test_a_long_prompt_is_encoded_in_pieces(folder: Path, models: Path, prompt: str) -> None:
    pipe = diffusers_pipeline(folder)

    def states(text: str) -> torch.Tensor:
        words = text.split()
        pieces = [" ".join(words[:75]), " ".join(words[75:])]
        asked: dict[str, Any] = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        with torch.no_grad():
            return torch.cat([pipe.text_encoder(pipe.tokenizer(one, **asked).input_ids)[0] for one in pieces], 1)

    theirs = pipe(
        prompt_embeds=states(prompt),
        negative_prompt_embeds=states(""),
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert psnr_db(picture_of(load_pipeline(models, "torch"), prompt), np.asarray(theirs)) >= PARITY_DB


def test_the_unet_alone_takes_more_tokens(models: Path) -> None:
    found = shapes(models)
    assert found["input_ids"] == (1, 77)
    assert found["encoder_hidden_states"][-1] == 154


def test_models_of_another_length_are_verified(models: Path, folder: Path) -> None:
    checked = list(verify_models(models, open_checkpoint(str(folder)), lambda _: None))
    assert {one.component for one in checked} >= {"unet", "text_encoder"}
    assert all(one.holds for one in checked)


def test_the_card_says_that_other_apps_do_not_do_this(models: Path) -> None:
    made = load_pipeline(models, "torch").manifest
    assert "takes 154 text tokens, 2 pieces of\n77" in model_card({"split_einsum_v2": made}, {})
    unet = made.components["unet"]
    usual = tuple(
        tensor.model_copy(update={"shape": (*tensor.shape[:-1], 77)} if tensor.name.startswith("enc") else {})
        for tensor in unet.inputs
    )
    components = {**made.components, "unet": unet.model_copy(update={"inputs": usual})}
    assert "pieces" not in model_card({"original": made.model_copy(update={"components": components})}, {})


@pytest.mark.parametrize("length", [0, -77, 76, 100, 153, 77 * 9, 10**9])
def test_lengths_that_no_pieces_make_are_refused(folder: Path, tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match=rf"--context-length {length}: expected 77, 154, 231, "):
        convert(folder, tmp_path / "models", ConvertOptions(**PLAIN, context_length=length))


def lengthened(folder: Path, target: Path, told: int | None) -> Path:
    """A checkpoint whose text encoder has 248 positions; ``told`` is what its tokenizer says of its length."""
    shutil.copytree(folder, target)
    encoder = target / "text_encoder"
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 248}))
    (file,) = encoder.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("position_ids")]:
        del tensors[name]
    (name,) = (name for name in tensors if "position_embedding" in name)
    rest = torch.randn(248 - 77, tensors[name].shape[1], generator=torch.Generator().manual_seed(0)) * 0.05
    tensors[name] = torch.cat([tensors[name], rest.to(tensors[name].dtype)])
    save_file(tensors, file, metadata={"format": "pt"})
    path = target / "tokenizer" / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key != "model_max_length"}
    path.write_text(json.dumps(settings if told is None else {**settings, "model_max_length": told}))
    return target


@pytest.mark.parametrize(
    ("told", "length", "verify"), [(248, 248, True), (248, 248, False), (77, 77, False), (None, 248, False)]
)
def test_encoders_with_more_positions(
    folder: Path, tmp_path: Path, told: int | None, length: int, verify: bool
) -> None:
    source = lengthened(folder, tmp_path / "checkpoint", told)
    convert(source, tmp_path / "models", ConvertOptions(**PLAIN, verify=verify))
    found = shapes(tmp_path / "models")
    assert (found["input_ids"][-1], found["encoder_hidden_states"][-1]) == (length, length)
    pipe = diffusers_pipeline(source)
    pipe.tokenizer.model_max_length = length  # not told, diffusers would pad to 10^30
    prompt = LONG if length == 248 else "a red cat"
    theirs = pipe(prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(3)).images[0]
    assert psnr_db(picture_of(load_pipeline(tmp_path / "models", "torch"), prompt), np.asarray(theirs)) >= PARITY_DB
