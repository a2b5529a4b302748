"""The README is true: its commands parse, those on the repository's own checkpoint run, its links lead to files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from diffusion_convert.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHAPES = ROOT / "tests" / "checkpoints" / "shapes"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every shell command of the README, continuation lines joined, comments removed."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


OURS = [words for words in commands() if words[0] == "coreml-sd"]
RUN_HERE = [words for words in OURS if any(part.startswith(("tests/checkpoints", "shapes-")) for part in words)]


def test_readme_has_commands_to_check() -> None:
    assert len(OURS) >= 10
    assert len(RUN_HERE) > 3
    assert len(blocks("python")) >= 1


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_command_is_one_that_the_program_has(words: list[str]) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    _, name, *arguments = words
    assert name in commands
    commands[name].make_context(name, arguments)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_named_paths_exist() -> None:
    """In README and CONTRIBUTING: whole ones, and those below a package's folder that begin with "…/"."""
    packages = (ROOT / "convert" / "diffusion_convert", ROOT / "runtime" / "diffusion_runtime")
    tops = "|".join(("convert", "runtime", "tests", "tools", "benchmarks", "swift_bridge"))
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    whole = re.findall(rf"`((?:{tops})/[^\s`]*)`", text)
    short = re.findall(r"`…/([^\s`]+)`", text)
    assert len(whole) > 10 and len(short) > 10
    assert [path for path in whole if not (ROOT / path).exists()] == []
    assert [path for path in short if not any((package / path).exists() for package in packages)] == []


@pytest.mark.slow
@pytest.mark.skipif(not SHAPES.is_dir(), reason="tests/checkpoints/shapes is not in this tree")
def test_commands_and_python_run_in_order(
    coreml_sd: Path, forked_python: Path, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    remembering = {**os.environ, "COREML_SD_REMEMBERED": str(shared / "remembered")}
    ours = [[str(coreml_sd), *words[1:]] for words in RUN_HERE]
    for words in [*ours, *([str(forked_python), "-c", code] for code in blocks("python"))]:
        done = subprocess.run(words, cwd=tmp_path, env=remembering, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert list(tmp_path.rglob("*.png"))
