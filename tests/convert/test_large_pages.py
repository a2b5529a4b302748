"""The command asks torch for large pages, unless the user has said otherwise."""

from __future__ import annotations

import os
import sys

import pytest

from diffusion_convert.cli.main import main


@pytest.mark.parametrize("said", [None, "0"])
def test_large_pages_are_asked_for(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    if said is not None:
        os.environ["THP_MEM_ALLOC_ENABLE"] = said
    monkeypatch.setattr(sys, "argv", ["coreml-sd", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (said or "1")
