"""The benchmarks' command lines: each teaches, and says in a line what is wrong."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import command_line
import run

README = Path(__file__).resolve().parent.parent / "README.md"
SCRIPTS = sorted({Path(script).stem for commands in run.BENCHES.values() for script, *_ in commands} - {"demo"})


def ended(script: str, arguments: Sequence[str], patch: pytest.MonkeyPatch) -> object:
    """The status that a benchmark with these arguments ends with."""
    patch.setattr("sys.argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as found:
        command_line.run(importlib.import_module(script).main)
    return found.value.code


def test_each_row_of_the_readme_has_a_name_that_measures_it() -> None:
    section = README.read_text(encoding="utf-8").partition("## How fast, how large, how good")[2]
    rows = re.findall(r"^\| ([a-z0-9-]+) \| .+ \|$", section.partition("\n\nA 6-bit")[0], re.MULTILINE)
    assert len(rows) > 8
    assert set(rows) <= run.BENCHES.keys()


@pytest.mark.parametrize("script", [*SCRIPTS, "before_after", "full_size", "run"])
def test_help_says_what_is_measured(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(script, ["--help"], monkeypatch) == 0
    assert f"    python benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("bench_palettize", "--way ours", "error: --way, one side alone, takes --package and --output"),
        (
            "bench_palettize",
            "--package nowhere",
            "nowhere: no package; `python benchmarks/full_size.py FOLDER` makes",
        ),
        ("bench_palettize", "--bits 5", "invalid choice: 5"),
        ("bench_mix", "--package nowhere", "nowhere: no package"),
        ("bench_convert", "--size 512", "error: size '512': expected WIDTHxHEIGHT in pixels"),
        ("bench_convert", "--nbits 9", "error: nbits 9"),
        ("bench_convert", "--component net", "invalid choice: 'net'"),
        ("bench_torch", "folder 4-bit", "unknown network '4-bit': expected one of original, 6-bit"),
        ("bench_compile", "nowhere", "make it with `python benchmarks/full_size.py nowhere`"),
        ("bench_loop", "--steps 0", "--steps: 0: expected a whole number from 1 on"),
        ("run", "nothing", "unknown measurement 'nothing': expected one of loop, swift"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    script: str, arguments: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = ended(script, arguments.split(), monkeypatch)
    told = status if isinstance(status, str) else capsys.readouterr().err.splitlines()[-1]
    assert status in (2, told)
    assert said in told


def test_a_measurement_that_failed_in_its_own_process_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise subprocess.CalledProcessError(3, "bench")

    with pytest.raises(SystemExit, match="2"):
        command_line.run(fails)
    assert capsys.readouterr().err == "error: a measurement ended with status 3: see above\n"


@pytest.mark.skipif(not (README.parent / ".git").exists(), reason="the files are in no Git repository")
def test_what_no_revision_has_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in ((["nosuch", "bench_torch.py"], "nosuch"), (["HEAD", "nosuch.py"], "no nosuch.py")):
        found = ended("before_after", arguments, monkeypatch)
        assert expected in f"{found}{capsys.readouterr().err}"
