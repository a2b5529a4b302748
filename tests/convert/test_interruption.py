"""Ctrl-C at early moments, while libraries are imported: one word, exit code 130, no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import toy_models

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
    "generate": (300, 1000, 2000),
    "convert": (300, 2000),
}
"""By command: imports of the command line, then of the libraries that the command needs."""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_models.write(tmp_path_factory.mktemp("toys") / "original" / "packages")


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


def test_an_error_that_a_library_makes_of_it(tmp_path: Path) -> None:
    """As numpy's C code does while it is imported: the error alone would be a traceback."""
    program = PROGRAM.format(
        moment=-1,
        start="""
import diffusion_convert.inspect
def interrupted(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ImportError("multiarray failed to import") from error
diffusion_convert.inspect.inspect = interrupted
from coreml_sd import main; main()
""",
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", "x"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
