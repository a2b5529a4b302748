"""The Swift program draws Python's pictures: at least 60 dB."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_convert import ConvertOptions, convert
from diffusion_runtime import images, load_pipeline
from diffusion_runtime.families import AttentionKind
from swift.conftest import Swift

PROMPT = "a large (red:1.3) circle, on a white background"
MIN_PSNR_DB = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "models"
    checkpoint = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes"
    convert(checkpoint, folder, ConvertOptions(attention=(AttentionKind.ORIGINAL,)))
    return folder


@pytest.mark.parametrize("scheduler", ["pndm", "euler-ancestral", "dpm++ 2m karras", "heun"])
@pytest.mark.parametrize("kind", ["packages", "compiled"])
def test_shapes(shapes: Path, kind: str, scheduler: str, swift_program: Swift, tmp_path: Path) -> None:
    models = shapes / "original" / kind
    drawn = _drawn(swift_program, models, tmp_path, scheduler, 12)
    pipe = load_pipeline(models, backend="torch", scheduler=scheduler)
    expected = pipe(PROMPT, num_inference_steps=12, seed=5).images[0]
    assert _psnr_db(drawn, expected) >= MIN_PSNR_DB


@pytest.mark.parametrize("family", ["sd1", "sd2-base", "sd2-v"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_tiny_checkpoints(
    family: str,
    batch_size: int,
    tiny_checkpoint: Callable[[str], Path],
    swift_program: Swift,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "models"
    options = ConvertOptions(attention=(AttentionKind.ORIGINAL,), batch_size=batch_size)
    convert(tiny_checkpoint(family), folder, options)
    models = folder / "original" / "packages"
    drawn = _drawn(swift_program, models, tmp_path, "euler", 6)
    pipe = load_pipeline(models, backend="torch", scheduler="euler")
    expected = pipe(PROMPT, num_inference_steps=6, seed=5).images[0]
    assert _psnr_db(drawn, expected) >= MIN_PSNR_DB


def test_pictures_say_how_they_were_made(toy_folder: Path, swift_program: Swift, tmp_path: Path) -> None:
    _drawn(swift_program, toy_folder, tmp_path, "ddim", 3)
    record = images.read_metadata(tmp_path / "swift.png")
    assert record["prompt"] == PROMPT and record["seed"] == 5 and record["scheduler"] == "ddim"
    assert json.loads(json.dumps(record)) == record


def test_what_cannot_be_done_is_one_line_and_exit_code_2(swift_program: Swift, tmp_path: Path) -> None:
    for arguments in (
        ("generate", str(tmp_path / "nowhere"), "--prompt", "x", "-o", "x.png"),
        ("generate", str(tmp_path), "--prompt", "x"),
        ("generate", str(tmp_path), "--prompt", "x", "-o", "x.png", "--scheduler", "magic"),
        ("generate", str(tmp_path), "--prompt", "x", "-o", "x.png", "--steps", "many"),
        ("generate", str(tmp_path), "--colour", "red"),
        ("fly",),
    ):
        done = swift_program(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def _psnr_db(drawn: Image.Image, expected: Image.Image) -> float:
    first, second = (np.asarray(image, np.float64) for image in (drawn, expected))
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _drawn(program: Swift, models: Path, folder: Path, scheduler: str, steps: int) -> Image.Image:
    output = folder / "swift.png"
    arguments = ["--prompt", PROMPT, "--seed", "5", "--steps", str(steps), "--scheduler", scheduler]
    done = program("generate", str(models), *arguments, "-o", str(output))
    assert done.returncode == 0, done.stderr
    with Image.open(output) as image:
        return image.convert("RGB")
