"""Files of tensors that are no files: a pipe would be waited for, a device has no end. And where memory ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from diffusion_convert.checkpoint import tensor_file
from diffusion_convert.checkpoint.lora import file
from diffusion_runtime.errors import CheckpointError

READERS: tuple[Callable[[Path], object], ...] = (tensor_file.read, file.read)


@pytest.mark.parametrize("reader", READERS, ids=["tensors", "LoRA"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_pipes_and_devices_are_refused(
    make: Callable[[Path], object], name: str, reader: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*not a regular file"):
        reader(tmp_path / name)


def test_a_file_that_no_memory_is_left_for_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")

    def refused(path: Path, framework: str) -> None:
        raise RuntimeError(f"unable to mmap 5 bytes from file <{path}>: Cannot allocate memory (12)")

    monkeypatch.setattr(safetensors, "safe_open", refused)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no memory is left to map it"):
        tensor_file.read(tmp_path / "x.safetensors")
