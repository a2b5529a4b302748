"""Pictures that show how far `generate --preview` is: there while it works, gone after, whatever ended it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusion_runtime.cli import app
from diffusion_runtime.pipeline import Pipeline

Run = Callable[..., Any]
PREVIEW = Path("p-preview.png")


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_folder: Path) -> Run:
    """Draws p.png with previews in an empty folder."""
    monkeypatch.chdir(tmp_path)
    command = ["generate", str(toy_folder), "--prompt", "a cat", "-o", "p.png", "--backend", "torch", "--preview"]
    return lambda *arguments: CliRunner().invoke(app, [*command, *arguments])


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if not path.name.startswith("."))


def test_previews_are_there_while_it_works_and_gone_after(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    preview = Pipeline.preview

    def watched(self: Pipeline, *arguments: Any) -> Image.Image:
        if PREVIEW.exists():
            with Image.open(PREVIEW) as picture:
                seen.append(picture.size)
        return preview(self, *arguments)

    monkeypatch.setattr(Pipeline, "preview", watched)
    assert generate("--steps", "12").exit_code == 0
    assert seen == [(64, 64)] * 2, "the first is there when the second and the third are made"
    assert [path.name for path in Path().iterdir()] == ["p.png"]


def test_a_picture_that_is_called_as_a_preview_is_kept(generate: Run) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(PREVIEW)
    before = PREVIEW.read_bytes()
    result = generate("--steps", "3")
    assert "p-preview.png: is there already, and --preview would overwrite it" in str(result.exception)
    assert PREVIEW.read_bytes() == before and not Path("p.png").exists()


@pytest.mark.parametrize("users", [False, True])
def test_what_a_killed_run_left_goes_with_the_next(
    generate: Run, monkeypatch: pytest.MonkeyPatch, users: bool
) -> None:
    """But not where the user has put a picture of that name there since."""

    def killed() -> None:
        monkeypatch.setattr(Pipeline, "finish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        generate("--steps", "12")

    child = get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and names() == ["p-preview.png"]
    if users:
        Image.new("RGB", (8, 8)).save(PREVIEW)
    result = generate("--steps", "3")
    if users:
        assert "would overwrite it" in str(result.exception)
        with Image.open(PREVIEW) as picture:
            assert picture.size == (8, 8)
    else:
        assert result.exit_code == 0, result.output
        assert [path.name for path in Path().iterdir()] == ["p.png"]
