"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_checkpoint("sd2-v")``: the folder of a tiny random checkpoint of that family, written once per session
    (`tiny_checkpoints.RECIPES` lists the families). It is shared: do not change it."""
    import tiny_checkpoints

    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            written[family] = tiny_checkpoints.build(family, tmp_path_factory.mktemp("checkpoints") / family)
        return written[family]

    return folder
