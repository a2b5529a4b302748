"""The command asks for large pages and keeps freed memory, unless the user has said otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from diffusion_convert.cli.main import main
from diffusion_runtime import memory

PLACE = """
import ctypes, os, sys
from pathlib import Path
if sys.argv[1]:
    from diffusion_runtime import memory
    memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
place = libc.malloc(ctypes.c_size_t(int(sys.argv[2])))
(heap,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
first, last = (int(end, 16) for end in heap.split()[0].split("-"))
print(first <= place < last)
"""
"""Tells whether memory of that many bytes is of the heap, where it stays when it is freed."""


@pytest.mark.parametrize("said", [None, "0"])
def test_large_pages_are_asked_for(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    if said is not None:
        os.environ["THP_MEM_ALLOC_ENABLE"] = said
    monkeypatch.setattr(sys, "argv", ["coreml-sd", "--help"])
    kept: list[bool] = []
    monkeypatch.setattr(memory, "keep_freed", lambda: kept.append(True))
    with pytest.raises(SystemExit):
        main()
    assert kept
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (said or "1")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory is set")
@pytest.mark.parametrize(
    ("asked", "size", "said", "kept"),
    [
        ("yes", memory.HELD_ELSEWHERE // 4, {}, True),
        ("", memory.HELD_ELSEWHERE // 4, {}, False),
        ("yes", memory.HELD_ELSEWHERE * 2, {}, False),
        ("yes", memory.HELD_ELSEWHERE // 4, {"MALLOC_MMAP_THRESHOLD_": "1000000"}, False),
    ],
)
def test_freed_memory_is_kept(asked: str, size: int, said: dict[str, str], kept: bool) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", PLACE, asked, str(size)], env={**plain, **said}, stdout=subprocess.PIPE, check=True
    )
    assert run.stdout.decode().strip() == str(kept)
