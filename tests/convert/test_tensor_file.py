"""Files of tensors that are no files: a pipe would be waited for, a device has no end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

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
