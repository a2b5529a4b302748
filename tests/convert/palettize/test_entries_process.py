"""The process that looks for palettes' entries: what it finds, and what happens without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffusion_convert.palettize import palettize_package as module
from diffusion_convert.palettize.entries_process import EntriesProcess
from diffusion_convert.palettize.palette import Problem, best_entries
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package


def problems() -> list[Problem]:
    random = np.random.default_rng(0)
    values = np.unique(random.standard_normal(3000).astype(np.float16).astype(np.float64))
    counts = random.integers(1, 50, len(values)).astype(np.float64)
    return [
        Problem(values, counts, 64, np.dtype(np.float16)),
        Problem(values[:700], counts[:700], 15, np.dtype(np.float32)),
        Problem(values[:3], counts[:3], 16, np.dtype(np.float16)),
    ]


def assert_found(found: list[np.ndarray]) -> None:
    for one, expected in zip(found, best_entries(problems()), strict=True):
        assert one.dtype == expected.dtype
        np.testing.assert_array_equal(one, expected)


def test_it_finds_the_best_entries_and_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with EntriesProcess() as find:
        for _ in range(2):
            assert_found(find(problems()))
        process = find._process
        assert process is not None and process.poll() is None  # it was this that answered
        process.kill()
        process.wait()
        assert_found(find(problems()))  # as if there were none
    assert process.poll() is not None


def test_where_no_process_can_be_started_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with EntriesProcess() as find:
        assert_found(find(problems()))


def test_packages_are_the_same_with_and_without_it(
    tiny_package: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(module, "_threads", lambda: 2)
    for long in (0, 2**60):
        monkeypatch.setattr(module, "_LONG", long)
        output = tmp_path / f"{long}.mlpackage"
        palettize_package(tiny_package("iOS16"), output, PalettizeOptions(4))
        written.append(
            [path.read_bytes() for path in sorted(output.rglob("*")) if path.suffix in (".bin", ".mlmodel")]
        )
    assert written[0] == written[1] and len(written[0]) == 2
