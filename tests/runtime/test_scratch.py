"""Temporary folders: gone with their block, and after a kill with the next one."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import pytest

from diffusion_runtime.scratch import scratch
from kill_points import Forks


def use() -> None:
    with scratch() as folder:
        (folder / "vocab.json").write_text("{}")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def use_in(temporary: Path) -> None:
    tempfile.tempdir = str(temporary)
    use()


def test_two_at_once_are_two(temporary: Path) -> None:
    with scratch() as one, scratch() as two:
        assert one != two and list(one.iterdir()) == list(two.iterdir()) == []
        assert one.is_relative_to(temporary)
    assert list(temporary.iterdir()) == []


def test_what_killed_processes_have_left_goes_with_the_next(temporary: Path, forks: Forks) -> None:
    step = left = 0
    while forks.kill_at(partial(use_in, temporary), step := step + 1):
        left += any(temporary.iterdir())
        use()
        assert list(temporary.iterdir()) == []
    assert step > 3 and left > 1
