"""`--clip-skip`: the text encoders' states are diffusers' with that ``clip_skip``, which it does not apply to
negative prompts. (SDXL's pictures: in test_embeddings.)"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.verification.folder import verify_models
from diffusion_runtime import InputError, load_pipeline
from diffusion_runtime.bundle import manifest
from diffusion_runtime.cli import app

PARITY_DB = 40.0
SKIPS = {"sd1": 2, "sd2-base": 1}
"""All of SD 1's two layers, and one of SD 2's three."""


def psnr_db(first: Any, second: Any) -> float:
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


@pytest.fixture(scope="module", params=SKIPS)
def made(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, int]:
    """Checkpoint, models and what they skip."""
    source, output = tiny_checkpoint(request.param), tmp_path_factory.mktemp("skipping") / "models"
    skip = SKIPS[request.param]
    # The padding of SD 2 is folded into its encoder, around what is skipped.
    convert(source, output, ConvertOptions("original", clip_skip=skip, verify=False, zip=False))
    return source, output, skip


@pytest.mark.parametrize("given", [{"negative_prompt": "red"}, {"guidance_scale": 1.0}], ids=["guided", "unguided"])
def test_the_picture_is_diffusers(made: tuple[Path, Path, int], given: dict[str, Any]) -> None:
    import diffusers

    source, output, skip = made
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(source), local_files_only=True, dtype=torch.float32)
    pipe.register_modules(safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    # diffusers asks for a level that transformers 5 dropped. Not as a submodule: it would be its own.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, **given}
    found = [
        pipe(**asked, clip_skip=one, output_type="np", generator=torch.Generator().manual_seed(3)).images[0]
        for one in (skip, None)
    ]
    ours = load_pipeline(output, "torch", check_safety=False)
    got = ours(**asked, clip_skip=skip, output_type="np", generator=torch.Generator().manual_seed(3)).images[0]
    # Networks this small draw nearly the same without it: another picture it is by far.
    assert psnr_db(got, found[0]) >= max(PARITY_DB, psnr_db(got, found[1]) + 10)


def test_it_is_told_and_verified(made: tuple[Path, Path, int], tmp_path: Path) -> None:
    source, output, skip = made
    packages = output / "original" / "packages"
    described = manifest.read(packages)
    assert described.clip_skip == skip and f"and clip skip {skip}" in (output / "README.md").read_text()
    only = {name: part for name, part in described.components.items() if name == "text_encoder"}
    copy = Path(shutil.copytree(packages, tmp_path / "packages"))
    manifest.write(described.model_copy(update={"components": only}), copy)
    (compared,) = verify_models(copy, open_checkpoint(str(source)), lambda _: None)
    assert compared.holds and compared.bound_db >= 60
    assert set(compared.psnr_db) == {"last_hidden_state", "pooled_outputs", "unskipped_states"}


def test_another_is_refused_when_pictures_are_made(made: tuple[Path, Path, int]) -> None:
    _, output, skip = made
    message = f"clip skip 0: it is part of the models, and these were converted with {skip}: convert again with"
    with pytest.raises(InputError, match=message):
        load_pipeline(output, "torch")("a cat", clip_skip=0)
    command = [
        "generate",
        str(output),
        "--prompt",
        "x",
        "--backend",
        "torch",
        "--clip-skip",
        "7",
        "-o",
        "never.png",
    ]
    with pytest.raises(InputError, match="clip skip 7: "):
        app(command, standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_skip": 3}, "--clip-skip 3: expected 0 to 2: the text encoder of sd1 has no more layers"),
        ({"clip_skip": -1}, "--clip-skip -1: expected 0 to 2"),
    ],
)
def test_what_cannot_be_skipped(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", ConvertOptions("original", **options))
