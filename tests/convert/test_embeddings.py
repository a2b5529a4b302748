"""`--embedding`: textual inversions of every kind of file, put in at conversion: the pictures are those of
diffusers' pipeline with ``load_textual_inversion``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion_convert import ConvertOptions, Embedding, convert
from diffusion_convert.checkpoint import unpickle
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.cli import main as program
from diffusion_convert.conversion.identity import fingerprint
from diffusion_runtime import load_pipeline
from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:the prompt was cut")
PARITY_DB = 40.0
WIDTH, WIDTH_2, TOY = 32, 40, "<toy>"
Tokens = Mapping[str, Mapping[str, torch.Tensor]]
"""The vectors of each token by text encoder."""


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def pickled(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def stored(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def web_ui(name: str, values: torch.Tensor) -> dict[str, Any]:
    """As AUTOMATIC1111's web UI writes a .pt."""
    told: dict[str, Any] = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(values)}}
    return {**told, "name": name, "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The option's text by the token that prompts call."""
    place = tmp_path_factory.mktemp("embeddings")
    folder = place / "concept"
    folder.mkdir()
    pickled(folder / "learned_embeds.bin", {"<one>": vectors(1, seed=2)[0]})
    return {
        "<style>": pickled(place / "a.bin", {"<style>": vectors(3, seed=1)}),
        "<one>": folder,
        "badhands": pickled(place / "b.pt", web_ui("badhands", vectors(2, seed=3))),
        "<mine>": stored(place / "c.safetensors", emb_params=vectors(2, seed=4)),
        "dstyle": stored(place / "dstyle.safetensors", emb_params=vectors(1, seed=5)),
    }


OWN = {"<mine>"}
"""Tokens that the option names."""


@pytest.fixture(scope="module")
def given(files: Mapping[str, Path]) -> tuple[Embedding, ...]:
    return tuple(Embedding(path, token if token in OWN else None) for token, path in files.items())


@pytest.fixture(scope="module")
def models(
    tiny_checkpoint: Callable[[str], Path], given: tuple[Embedding, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("models") / "models"
    convert(tiny_checkpoint("sd1"), output, ConvertOptions("original", embeddings=given, zip=False))
    return output


def theirs(folder: Path) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    if hasattr(pipe, "safety_checker"):
        pipe.register_modules(safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(ours: Pipeline, pipe: Any, prompt: str, **given: Any) -> float:
    asked: dict[str, Any] = {"prompt": prompt, "num_inference_steps": 2, **given}
    expected = pipe(**asked, output_type="np", generator=torch.Generator().manual_seed(3)).images[0]
    got = ours(**asked, generator=torch.Generator().manual_seed(3)).images[0]
    error = float(np.mean((np.asarray(got) / 255.0 - expected) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def test_the_pictures_are_diffusers(
    tiny_checkpoint: Callable[[str], Path], models: Path, files: Mapping[str, Path]
) -> None:
    pipe = theirs(tiny_checkpoint("sd1"))
    for token, path in files.items():
        pipe.load_textual_inversion(str(path), token=token)
    plain = theirs(tiny_checkpoint("sd1"))
    prompts = ("a cat in <style>", "<mine>, a <one> cat, badhands, dstyle", "<STYLE> <style>_1 cat", "a red circle")
    for kind in ("packages", "compiled"):
        ours = load_pipeline(models / "original" / kind, "torch", check_safety=False)
        for prompt in prompts if kind == "packages" else prompts[1:2]:
            assert psnr(ours, pipe, prompt) >= PARITY_DB, (kind, prompt)
    assert psnr(ours, plain, prompts[1]) < PARITY_DB, "the vectors change the picture"


def test_manifest_and_card_name_them(models: Path) -> None:
    made = manifest.read(models / "original" / "packages")
    assert [(one.token, one.vectors) for one in made.source.embeddings] == [
        ("<style>", 3),
        ("<one>", 1),
        ("badhands", 2),
        ("<mine>", 2),
        ("dstyle", 1),
    ]
    encoder = made.components["text_encoder"]
    assert min(encoder.psnr_db.values()) >= 60
    assert "textual inversions `<style>` (3 vectors, `a.bin`)" in (models / "README.md").read_text()


def test_another_file_or_token_is_another_conversion(
    tiny_checkpoint: Callable[[str], Path], given: tuple[Embedding, ...], models: Path, tmp_path: Path
) -> None:
    source = tiny_checkpoint("sd1")
    again = convert(source, models, ConvertOptions("original", embeddings=given, zip=False))
    assert again.unchanged
    file = pickled(tmp_path / "x.pt", {"<x>": vectors(1)})

    def stamp(*embeddings: Embedding) -> str:
        options = ConvertOptions("original", embeddings=embeddings)
        return fingerprint(open_checkpoint(str(source), ConvertOptions(embeddings=options.embeddings)), options)

    stamps = [stamp(), stamp(Embedding(file)), stamp(Embedding(file, "<y>"))]
    pickled(file, {"<x>": vectors(2)})
    assert len({*stamps, stamp(Embedding(file))}) == 4


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[Any, str]:
    monkeypatch.setattr(sys, "argv", ["coreml-sd", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        program.main()
    return left.value.code, capsys.readouterr().err


def test_verify_takes_the_option(
    tiny_checkpoint: Callable[[str], Path],
    given: tuple[Embedding, ...],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [f"--embedding={one.path}" + (f":{one.token}" if one.token else "") for one in given]
    command = ("verify", models / "original" / "packages", "--against", tiny_checkpoint("sd1"))
    code, said = run(monkeypatch, capsys, *command, *options)
    assert code == 0 and "note:" not in said
    code, said = run(monkeypatch, capsys, *command)
    assert "was made with --embedding a.bin:<style> --embedding" in said and "with no textual inversion" in said


def test_an_unknown_one_in_a_prompt_is_said(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command in one line, with exit code 2: diffusers draws its letters as if they were words."""
    command = ("generate", models, "--backend", "torch", "--steps", 1, "-o", tmp_path / "x.png", "--prompt")
    code, said = run(monkeypatch, capsys, *command, "a cat in <stile>")
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and "names <stile>, an embedding that these models do not know (known are <mine>" in line
    assert "--embedding FILE:<stile>, or write \\<stile> for the text itself" in line
    clip = load_pipeline(models, "torch").tokenizer
    with pytest.raises(InputError, match="convert with --lora FILE"):
        clip.encode("a cat <lora:style:1>")
    expected = clip.clip("x < 3 > <3 (a <stile>)", padding="max_length", max_length=77).input_ids
    assert clip.encode("x < 3 > <3 (a \\<stile>)").ids[0].tolist() == expected


def test_both_encoders_of_sdxl_have_their_own_and_skip_layers(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    both = {"clip_l": vectors(2, seed=1), "clip_g": vectors(2, WIDTH_2, seed=2)}
    file = stored(tmp_path / "toy.safetensors", **both)
    source = tiny_checkpoint("sdxl")
    options = ConvertOptions("original", embeddings=f"{file}:{TOY}", clip_skip=1, verify=False, compiled=False)
    convert(source, tmp_path / "models", options)
    pipe = theirs(source)
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        encoder, clip = getattr(pipe, f"text_encoder{number}"), getattr(pipe, f"tokenizer{number}")
        pipe.load_textual_inversion({name: both[name]}, token=TOY, text_encoder=encoder, tokenizer=clip)
    ours, given = load_pipeline(tmp_path / "models", "torch"), {"negative_prompt": "red", "clip_skip": 1}
    assert psnr(ours, pipe, "a <toy> cat", **given) >= PARITY_DB


def test_a_palettized_encoder_keeps_within_its_bound(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With the new rows, and with layers skipped: what it is verified against has both."""
    file = pickled(tmp_path / "x.pt", {"<x>": 0.02 * vectors(3)})
    options = ConvertOptions(
        "original", components="text_encoder", nbits=6, embeddings=file, clip_skip=1, compiled=False
    )
    made = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    encoder = made.variants["original"].components["text_encoder"]
    assert encoder.palettization is not None and encoder.palettization.nbits == 6
    assert {"last_hidden_state", "unskipped_states"} <= encoder.psnr_db.keys()


def truncated(path: Path) -> Path:
    stored(path, emb_params=vectors(2))
    path.write_bytes(path.read_bytes()[:-10])
    return path


WRONG: Mapping[str, tuple[str, Callable[[Path], object], str]] = {
    "width": ("sd1", lambda to: stored(to / "x.safetensors", x=vectors(1, 48)), "vectors of 48 numbers, but the"),
    "SDXL's for SD 1": (
        "sd1",
        lambda to: stored(to / "x.safetensors", clip_l=vectors(1), clip_g=vectors(1, WIDTH_2)),
        "is of Stable Diffusion XL, with two text encoders",
    ),
    "SD 1's for SDXL": (
        "sdxl",
        lambda to: stored(to / "x.safetensors", x=vectors(1)),
        "is for one text encoder: expected clip_l and clip_g",
    ),
    "one of two": (
        "sdxl",
        lambda to: stored(to / "x.safetensors", clip_l=vectors(1)),
        "no vectors for the text_enc",
    ),
    "uneven": (
        "sdxl",
        lambda to: stored(to / "x.safetensors", clip_l=vectors(1), clip_g=vectors(2, WIDTH_2)),
        "has 1 and 2 vectors for the two encoders",
    ),
    "token of the vocabulary": (
        "sd1",
        lambda to: f"{stored(to / 'x.safetensors', x=vectors(1))}:cat</w>",
        "already",
    ),
    "a file of other things": (
        "sd1",
        lambda to: stored(to / "x.safetensors", a=vectors(1), b=vectors(1)),
        "holds 2 tensors",
    ),
    "not finite": ("sd1", lambda to: stored(to / "x.safetensors", x=vectors(1) / 0), "are not finite"),
    "too many": ("sd1", lambda to: stored(to / "x.safetensors", x=vectors(76)), "has room for 75"),
    "whole numbers": ("sd1", lambda to: stored(to / "x.safetensors", x=torch.ones(2, WIDTH).int()), "expected"),
    "truncated": ("sd1", lambda to: truncated(to / "x.safetensors"), "damaged"),
    "no pickle of tensors": ("sd1", lambda to: pickled(to / "x.pt", {"name": "x"}), "holds no named tensors"),
    "missing": ("sd1", lambda to: to / "nothing.pt", "cannot be read"),
    "empty folder": ("sd1", lambda to: to, "has no learned_embeds.safetensors and no learned_embeds.bin"),
    "no token": ("sd1", lambda to: f"{to / 'x.pt'}:", "the token after the colon is empty"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_put_in_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    family, made, message = WRONG[kind]
    with pytest.raises((InputError, CheckpointError)) as caught:
        embeddings = ConvertOptions(embeddings=made(tmp_path)).embeddings  # type: ignore[arg-type]
        open_checkpoint(str(tiny_checkpoint(family)), ConvertOptions(embeddings=embeddings))
    said = str(caught.value)
    assert message in said and said.startswith("--embedding") and "\n" not in said


def test_two_of_one_name_are_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    first = stored(tmp_path / "a.safetensors", x=vectors(2))
    second = stored(tmp_path / "b.safetensors", x_1=vectors(1))
    with pytest.raises(InputError, match="the token 'x_1' is given twice"):
        open_checkpoint(
            str(tiny_checkpoint("sd1")), ConvertOptions(embeddings=(Embedding(first), Embedding(second)))
        )


def test_parameters_that_torch_holds_in_a_module_are_read(tmp_path: Path) -> None:
    """The first textual inversions were saved with torch's ParameterDict, which diffusers no longer opens."""
    values = torch.randn(3, 8)
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(values)})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": held}, tmp_path / "style.pt")
    (found,) = unpickle.load(tmp_path / "style.pt").tensors.values()
    assert torch.equal(found, values)
