"""Which Python `make setup` takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "python.sh"
Chosen = Callable[..., str]


@pytest.fixture
def chosen(tmp_path: Path) -> Chosen:
    """``chosen(folder, …)``: what is printed where these and the programs that the script needs are on PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "sort", "awk", "cat"):
        (programs / name).symlink_to(str(shutil.which(name)))

    def printed(*folders: Path) -> str:
        path = os.pathsep.join(map(str, (*folders, programs)))
        done = subprocess.run(["sh", SCRIPT], env={"PATH": path}, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout

    return printed


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


def answering(path: Path, minor: int, seconds: float) -> Path:
    """A program that says of itself what a Python of that version and speed would."""
    return program(path, f"cat > /dev/null\nprintf '{minor}\\t{seconds}\\t%s\\n' \"$0\"")


def with_version(path: Path, version: tuple[int, int, int]) -> Path:
    """This Python, taken for that version."""
    return program(path, f"(echo 'import sys; sys.version_info = {version}'; cat) | '{sys.executable}' -")


@pytest.mark.parametrize(("newer", "expected"), [(0.9, "python3.13"), (1.1, "python3.13"), (1.3, "python3.12")])
def test_the_newest_is_taken_unless_another_is_clearly_faster(
    chosen: Chosen, tmp_path: Path, newer: float, expected: str
) -> None:
    folder = tmp_path / "a b"
    answering(folder / "python3.12", 12, 1.0)
    answering(folder / "python3.13", 13, newer)
    assert chosen(folder) == f"{folder / expected}\n"


def test_of_one_version_the_first_on_path_is_taken(chosen: Chosen, tmp_path: Path) -> None:
    first, second = (answering(tmp_path / name / "python3", 13, 1.0).parent for name in ("z", "a"))
    assert chosen(first, second) == f"{first}/python3\n"


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 13, 9)])
def test_a_python_says_where_it_is(chosen: Chosen, tmp_path: Path, version: tuple[int, int, int]) -> None:
    assert chosen(with_version(tmp_path / "its" / "python3", version).parent) == f"{sys.executable}\n"


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0)])
def test_those_that_are_not_supported_or_fail_are_passed_over(
    chosen: Chosen, tmp_path: Path, version: tuple[int, int, int]
) -> None:
    folder = with_version(tmp_path / "its" / "python3.12", version).parent
    program(folder / "python3", "echo is not here >&2; exit 1")
    assert not chosen(folder)
