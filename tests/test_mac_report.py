"""The Mac's workflow, as far as it runs anywhere: its file is valid, its commands exist, its script finds what is
wrong on strict stand-ins."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml  # type: ignore[import-untyped]

import mac_report
from diffusion_convert import compile as compiling
from diffusion_convert.cli.main import app
from diffusion_convert.components.component import Shape
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import operations

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
OF_THE_RUNNER = ("sudo", "swift", "xcodebuild")
THEIR_VERSIONS = {"coremlc-component-MIL": "3600.1.1", "coremlc-version": "3600.2.2"}


def commands() -> Iterator[list[str]]:
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            for step in job["steps"]:
                if "run" in step:
                    yield from (shlex.split(line) for line in step["run"].splitlines() if line.strip())


def test_every_command_of_the_workflows_exists() -> None:
    found = list(commands())
    assert any("tests/mac_report.py" in words for words in found)
    ours: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for program, *rest in found:
        if program == ".venv/bin/coreml-sd":
            ours[rest[0]].make_context(rest[0], rest[1:])
        elif program == "make":
            assert re.search(rf"^{rest[0]}:", makefile, flags=re.MULTILINE), rest
        elif program == ".venv/bin/python":
            assert rest[:2] == ["-m", "pytest"] or (ROOT / rest[0]).is_file(), rest
        elif program not in OF_THE_RUNNER:
            assert os.access(ROOT / program, os.X_OK), program


@pytest.fixture
def forked_script(forked_python: Path, tmp_path: Path) -> str:
    """A program that stands for ``sys.executable`` where a script follows."""
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = tmp_path / "python"
    words.write_text(f'#!/bin/sh\nexec "{forked_python}" -c "{code}" "$@"\n')
    words.chmod(0o700)
    return str(words)


def test_the_scripts_commands_are_those_that_it_takes(forked_script: str) -> None:
    for words in (words for words in commands() if "tests/mac_report.py" in words):
        done = subprocess.run(
            [forked_script, "tests/mac_report.py", *words[2:3], "--help"],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, words
        assert words[2] in ("units", "compilers")


@pytest.mark.slow
def test_a_unet_of_real_depth_runs_on_each_unit(
    forked_script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the torch backend in Core ML's place, which takes no notice of compute units."""
    monkeypatch.setattr(mac_report, "TARGETS", ("macOS15",))
    monkeypatch.setattr(mac_report, "AttentionKind", (AttentionKind.ORIGINAL,))
    monkeypatch.setattr(sys, "executable", forked_script)
    assert mac_report.main(["units", str(tmp_path), "--backend", "torch"]) == 0
    found = json.loads((tmp_path / "units.json").read_text())
    assert [case["case"] for case in found] == [
        f"original, macOS15, {unit}" for unit in ("cpu-and-gpu", "cpu-and-ne", "cpu-only")
    ]
    assert all(case["psnr_db"] >= 100 and not case["wrong"] for case in found)
    assert "original, macOS15, cpu-and-gpu: 200.0 dB" in capsys.readouterr().out
    block = open_package(tmp_path / "original-macOS15.mlpackage").model.function.block
    fused = [one for one in operations(block) if one.type == "scaled_dot_product_attention"]
    assert len(fused) == 2 * (
        2 * 3 + 1 + 3 * 3
    )  # SD 1.5's: self and cross, three blocks down, the middle, three up


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("print(55.0)", ""),
        ("print(12.5)", "computes something else: 12.5 dB"),
        ("print('-inf')", "computes something else: -inf dB"),
        ("import os; os.abort()", "ended by signal 6: nothing was said"),
        ("raise SystemExit('Core ML cannot load it')", "ended with 1: Core ML cannot load it"),
        ("pass", "ended with 0: nothing was said"),
    ],
)
def test_a_unit_that_is_wrong_or_ends_the_process_is_told(code: str, wrong: str) -> None:
    assert mac_report.in_a_process([sys.executable, "-c", code])[1] == wrong


def test_what_is_wrong_ends_with_one(tmp_path: Path) -> None:
    cases = [{"case": "a", "wrong": ""}, {"case": "b", "wrong": "model.mil"}]
    shown: list[str] = []
    assert mac_report.run("compilers", iter(cases), tmp_path, shown.append) == 1
    assert shown == ["a: the same", "b: model.mil"]
    assert mac_report.run("compilers", iter(cases[:1]), tmp_path, shown.append) == 0


class Xcrun:
    """Stands in for Apple's compiler: takes exactly its arguments, and writes what ours does, with the versions of
    another release. ``spoils``: a file that it writes otherwise."""

    def __init__(self, spoils: str = "") -> None:
        self.spoils = spoils

    def __call__(self, command: list[str], **options: Any) -> SimpleNamespace:
        program, compiler, verb, package, folder = command
        assert (program, compiler, verb) == ("xcrun", "coremlcompiler", "compile")
        assert Path(package).is_dir() and Path(folder).is_dir() and not options.get("shell")
        source = Path(package)
        made = Path(folder) / f"{source.stem}.mlmodelc"
        if "two-functions" in source.name:
            made.mkdir()
            (made / "model.mil").write_text("program(1.3)\n")
        else:
            compiling.compile_package(source, Path(folder), versions=THEIR_VERSIONS)
            data = (made / "metadata.json").read_text()
            (made / "metadata.json").write_text(json.dumps([dict(reversed(json.loads(data)[0].items()))]))
        if self.spoils:
            (made / self.spoils).write_bytes(b"other")
        return SimpleNamespace(returncode=0, stdout="", stderr="")


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[Xcrun], None]:
    def with_compiler(xcrun: Xcrun) -> None:
        monkeypatch.setattr("platform.system", lambda: "Darwin")
        monkeypatch.setattr("subprocess.run", xcrun)

    return with_compiler


@pytest.mark.slow
def test_compiled_models_are_compared_and_kept(
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    on_a_mac: Callable[[Xcrun], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusion_convert.checkpoint.open import open_checkpoint
    from diffusion_convert.components import table
    from diffusion_convert.export.export import ExportOptions, export
    from diffusion_runtime.mil.program import Metadata

    made = []
    for side in (64, 128):
        path = tmp_path / f"unet-{side}.mlpackage"
        options = ExportOptions(AttentionKind.ORIGINAL, Shape(side, side, 2), "macOS15")
        metadata = Metadata(user_defined={"one": "1", "two": "2"})
        export(table()["unet"], open_checkpoint(str(tiny_checkpoint("sd1"))), options, path, metadata)
        made.append(path)
    both = mac_report.two_functions(made, tmp_path / "unet-two-functions.mlpackage")
    assert both.is_dir()
    monkeypatch.setattr(mac_report, "packages", lambda _: iter([made[0], both]))
    on_a_mac(Xcrun())
    report = tmp_path / "report"
    assert mac_report.main(["compilers", str(report)]) == 0
    first, second = json.loads((report / "compilers.json").read_text())
    assert first == {"case": "unet-64", "wrong": ""}
    assert second["case"] == "unet-two-functions"
    assert "functions" in second["refused"]
    assert (report / "apple" / "unet-two-functions.mlmodelc" / "model.mil").is_file()
    assert (report / "ours" / "unet-64.mlmodelc" / "model.mil").is_file()
    for spoilt in ("model.mil", "weights/weight.bin", "analytics/coremldata.bin", "more.json"):
        monkeypatch.setattr(mac_report, "packages", lambda _: iter([made[0]]))
        on_a_mac(Xcrun(spoilt))
        assert mac_report.main(["compilers", str(tmp_path / spoilt.replace("/", "-"))]) == 1, spoilt
