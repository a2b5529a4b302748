"""Textual inversions of several vectors, saved into a checkpoint by diffusers: the pictures are diffusers'."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.bundle.add_manifests import add_manifests
from diffusion_convert.checkpoint.vocabulary import TOKENIZER_FILES, write_vocabulary
from diffusion_runtime import load_pipeline
from diffusion_runtime.bundle.integrity import Hashes
from diffusion_runtime.bundle.without_manifest import Assumed
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.pipeline import Pipeline
from diffusion_runtime.prompt import tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:the prompt was cut"),
    pytest.mark.usefixtures("loaded_once"),
]
PARITY_DB = 40.0
VECTORS: Mapping[str, int] = {"<style>": 3, "sks": 2, "<one>": 1}
PROMPTS = (
    "a cat in <style>",
    "<style>, a <one> cat and a <style> horse",
    "sks cat, asks",
    "<style>_1 <style>",
    "<STYLE> cat",
    "a red circle",
    " ".join(["<style>"] * 40),
)


def inverted(source: Path, folder: Path, vectors: Mapping[str, int] = VECTORS) -> Path:
    """The checkpoint with textual inversions in it, as diffusers loads and saves them."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(str(source), local_files_only=True)
    if hasattr(pipe, "safety_checker"):
        pipe.register_modules(safety_checker=None, feature_extractor=None)
    draw = torch.Generator().manual_seed(7)
    encoders = [(pipe.text_encoder, pipe.tokenizer)]
    encoders += [(pipe.text_encoder_2, pipe.tokenizer_2)] if hasattr(pipe, "text_encoder_2") else []
    for token, count in vectors.items():
        for encoder, clip in encoders:
            values = torch.randn(count, encoder.config.hidden_size, generator=draw).half()
            pipe.load_textual_inversion({token: values}, token=token, text_encoder=encoder, tokenizer=clip)
    pipe.save_pretrained(str(folder))
    return folder


@cache
def theirs(folder: Path) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inverted(tiny_checkpoint("sd1"), tmp_path_factory.mktemp("inverted") / "checkpoint")


@pytest.fixture(scope="module")
def models(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "models"
    convert(checkpoint, output, ConvertOptions(attention="original", verify=False))
    return output


@cache
def loaded(place: Path) -> Pipeline:
    return load_pipeline(place, "torch")


def same(pipeline: Pipeline, folder: Path, prompt: str) -> float:
    """PSNR in dB of our picture and diffusers'."""
    asked: dict[str, Any] = {"prompt": prompt, "num_inference_steps": 2, "output_type": "np"}
    expected = theirs(folder)(**asked, generator=torch.Generator().manual_seed(3)).images[0]
    del asked["output_type"]
    got = pipeline(**asked, generator=torch.Generator().manual_seed(3)).images[0]
    error = float(np.mean((np.asarray(got) / 255.0 - expected) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [*(("packages", prompt) for prompt in PROMPTS), ("compiled", PROMPTS[1]), ("zip", PROMPTS[1])],
)
def test_a_prompt_names_all_vectors_of_an_inversion(
    checkpoint: Path, models: Path, tmp_path: Path, kind: str, prompt: str
) -> None:
    place = models / "original" / kind
    if kind == "zip":
        (packed,) = models.glob("*original_compiled.zip")
        with zipfile.ZipFile(packed) as file:
            file.extractall(place := tmp_path / "unpacked")
    assert same(loaded(place), checkpoint, prompt) >= PARITY_DB


def test_both_encoders_of_sdxl_have_their_own_vectors(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = inverted(tiny_checkpoint("sdxl"), tmp_path / "checkpoint")
    convert(folder, tmp_path / "models", ConvertOptions("original", verify=False, compiled=False))
    assert same(load_pipeline(tmp_path / "models", "torch"), folder, "<style> cat, sks") >= PARITY_DB


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("saved", ["transformers 5", "transformers 4"])
def test_the_ids_are_those_of_diffusers(checkpoint: Path, tmp_path: Path, saved: str, prompt: str) -> None:
    from transformers import CLIPTokenizer

    source = shutil.copytree(checkpoint / "tokenizer", tmp_path / "tokenizer")
    files = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    (target := tmp_path / "written").mkdir()
    write_vocabulary(files, target)
    if saved == "transformers 4":  # as ours: a vocabulary, merges and added_tokens.json
        source, target = target, tmp_path / "again"
        target.mkdir()
        write_vocabulary({path.name: path for path in source.iterdir()}, target)
    clip = CLIPTokenizer.from_pretrained(str(checkpoint / "tokenizer"), local_files_only=True)
    converted = theirs(checkpoint).maybe_convert_prompt(prompt, clip)
    expected = clip(converted, padding="max_length", max_length=77, truncation=True).input_ids
    assert tokenizer.load(target).encode(prompt).ids[0].tolist() == expected


def without_embedding(checkpoint: Path, folder: Path, size: int) -> Path:
    """The checkpoint with an embedding for ``size`` tokens only."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    save_file({**tensors, name: tensors[name][:size].clone()}, file, metadata={"format": "pt"})
    return folder


def words_of(checkpoint: Path) -> int:
    """How many tokens the tokenizer had before some were added."""
    return len(tokenizer.load(checkpoint / "tokenizer").clip) - sum(VECTORS.values())


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
def test_a_token_without_an_embedding_is_refused_where_it_is_used(
    checkpoint: Path, tmp_path: Path, foreign: bool
) -> None:
    words = words_of(checkpoint)
    folder = without_embedding(checkpoint, tmp_path / "checkpoint", words + 3)  # those of <style>
    options = ConvertOptions(attention="original", verify=False, compiled=False, zip=False)
    made = convert(folder, tmp_path / "models", options)
    assert any(f"embedding for {words + 3} tokens, its tokenizer has 3 more" in note for note in made.notes)
    packages = tmp_path / "models" / "original" / "packages"
    if foreign:
        (packages / "manifest.json").unlink()
    pipeline = load_pipeline(packages, "torch")
    assert pipeline.manifest.components["text_encoder"].vocabulary_size == words + 3
    if not foreign:
        assert same(pipeline, folder, "a cat in <style>") >= PARITY_DB
    with pytest.raises(
        InputError, match=rf"'<one>' the number {words + 5}, but the text_encoder knows {words + 3}"
    ):
        pipeline("a <one> cat", num_inference_steps=1)
    with pytest.raises(IndexError):
        theirs(folder)("a <one> cat", num_inference_steps=1)


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = without_embedding(checkpoint, tmp_path / "checkpoint", words_of(checkpoint) - 1)
    with pytest.raises(
        CheckpointError, match=r"the tokenizer gives <\|endoftext\|> the number .*: not of one model$"
    ):
        convert(folder, tmp_path / "models", ConvertOptions(attention="original"))
    assert not (tmp_path / "models").exists()


PLACES = ("packages/tokenizer", "packages/Resources", ".", "tokenizer", "Resources", "compiled")


@pytest.mark.parametrize(
    ("place", "files"),
    [
        *((place, "tokenizer.json") for place in ("packages", *PLACES)),
        *((place, files) for place in ("packages", "Resources") for files in ("vocab.json", "vocab.json alone")),
    ],
)
def test_folders_of_other_tools_have_their_tokenizer_anywhere(
    checkpoint: Path, models: Path, tmp_path: Path, place: str, files: str
) -> None:
    """No manifest, and the tokenizer in either form: generate and bundle find it, added tokens and all."""
    variant = tmp_path / "original"
    shutil.copytree(models / "original" / "packages", variant / "packages", copy_function=os.link)
    (target := variant / place).mkdir(parents=True, exist_ok=True)
    for path in [path for path in (variant / "packages").iterdir() if path.is_file()]:
        if path.name != "manifest.json" and files != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
        path.unlink()
    source = checkpoint / "tokenizer" if files == "tokenizer.json" else tmp_path
    left_out = () if files != "vocab.json alone" else ("added_tokens.json", "tokenizer_config.json")
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and name not in left_out:
            shutil.copyfile(source / name, target / name)
    # Without its settings' files a tokenizer knows no added tokens, and refuses their names.
    prompt = "a cat in <style>" if not left_out else r"a cat in \<style>"
    expected = tokenizer.load(target).encode(prompt).ids.tolist()
    found = load_pipeline(variant / "packages", "torch")
    assert found.tokenizer.encode(prompt).ids.tolist() == expected
    for _ in add_manifests(tmp_path, {}, Assumed(), None, Hashes(), lambda _: None):
        pass
    assert (variant / "packages" / "manifest.json").is_file() and (variant / "packages" / "vocab.json").is_file()
    bundled = load_pipeline(variant / "packages", "torch")
    assert bundled.tokenizer.encode(prompt).ids.tolist() == expected
