"""Ctrl-C at any moment, also while libraries are imported: one line, exit code 130, no traceback."""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toy_models
from diffusion_convert.cli.main import main
from diffusion_runtime.errors import CheckpointError

# Where the tests' own parent ignores Ctrl-C, as nohup and background jobs of shells do, every child would too.
PROGRAM = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
count = 0

def hook(event, _):
    global count
    if event == "import":
        count += 1
        if count == {moment}:
            print("sent", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(hook)
{start}
"""
START = {"script": "from coreml_sd import main; main()", "-m": "runpy.run_module('coreml_sd', run_name='__main__')"}
MOMENTS = {
    "inspect": (8, 100, 300),
    "palettize": (300, 600, 900),
    "generate": (300, 900, 1500),
    "convert": (300, 2000),
}
"""By command: imports of the command line, then of the libraries that the command needs."""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_models.write(tmp_path_factory.mktemp("toys") / "original" / "packages")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a conversion that is stopped again and again, and goes on."""
    return tmp_path_factory.mktemp("stopped") / "models"


@pytest.fixture
def commands(
    toys: Path, tiny_unet: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> dict[str, list[object]]:
    return {
        "inspect": [toys / f"{toy_models.APPLE}unet.mlpackage"],
        "palettize": [tiny_unet, "-o", tmp_path / "small.mlpackage"],
        "generate": [toys, "--prompt", "a cat", "-o", tmp_path / "p.png", "--backend", "torch", "--steps", "2"],
        "convert": [tiny_checkpoint("sd1"), "-o", tmp_path / "models", "--components", "text_encoder"],
    }


def interrupted(start: str, moment: int, *arguments: object) -> tuple[int, str, str]:
    """Exit code and both outputs of a command that gets SIGINT at its import number ``moment``."""
    program = PROGRAM.format(moment=moment, start=START[start])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("name", "moment"), [(name, moment) for name in MOMENTS for moment in MOMENTS[name]])
def test_a_word_and_exit_code_130(
    name: str, moment: int, commands: dict[str, list[object]], tmp_path: Path
) -> None:
    code, shown, said = interrupted("script", moment, name, *commands[name])
    assert shown == "sent\n"
    assert (code, len(said.strip().splitlines()), "interrupted" in said) == (130, 1, True), said
    assert list(tmp_path.iterdir()) == []


def test_run_as_a_module() -> None:
    assert interrupted("-m", 100, "--help") == (130, "sent\n", "interrupted\n")


MADE_OF_IT = {
    "numpy": ImportError("multiarray failed to import"),
    "safetensors": CheckpointError("damaged, or no file of tensors"),  # ours for SafetensorError
    "torch": RuntimeError("trying to pop from empty mode stack"),
    "system": OSError("a read was broken off"),
    "lost": None,  # as in a finalizer
}
"""What libraries make of Ctrl-C in the middle of a command's work."""
WORK = {
    "inspect": ("diffusion_convert.inspect.inspect", "interrupted"),
    "palettize": ("diffusion_convert.palettize.checked.palettize_package", "interrupted"),
    "bench": ("diffusion_runtime.performance.measure", "interrupted"),
    "generate": ("diffusion_runtime.guidance.predictor", "note: interrupted: 0 of 1 pictures are finished"),
    "batch": (
        "diffusion_runtime.batch.run.Batch.run",
        "note: interrupted: 0 of 1 pictures are finished; the same command goes on with the rest",
    ),
    "convert": (
        "diffusion_convert.conversion.convert.assemble",
        "interrupted: text_encoder finished and kept; run the same command again to go on",
    ),
}
"""By command: the function at whose beginning Ctrl-C comes, and what is said last."""


@pytest.mark.parametrize(
    ("name", "library"),
    [
        (name, library)
        for name in WORK
        for library in MADE_OF_IT
        # These have no callback in this process in which what was lost could be noticed.
        if not (library == "lost" and name in ("inspect", "batch"))
    ],
)
def test_whatever_libraries_make_of_it(
    name: str,
    library: str,
    commands: dict[str, list[object]],
    toys: Path,
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seen with real files and real signals: one of them said that the user's checkpoint was damaged."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    commands |= {"bench": [toys, "--backend", "torch"], "batch": [toys, prompts, "-o", tmp_path / "out"]}
    quick = ["-o", stopped, "--no-verify", "--no-compiled", "--attention", "original"] if name == "convert" else []
    place, last = WORK[name]
    work = pkgutil.resolve_name(place)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as interruption:
            if (error := MADE_OF_IT[library]) is not None:
                raise error from interruption
        return work(*arguments, **named)

    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr(sys, "argv", ["coreml-sd", name, *map(str, [*commands[name], *quick])])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert (ended.value.code, said.splitlines()[-1:]) == (130, [last]), said
