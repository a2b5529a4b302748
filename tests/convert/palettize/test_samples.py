"""`palettize --samples FILE.npz`: files that are damaged, hostile or too large."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_convert.palettize import outputs
from diffusion_convert.palettize.outputs import load_samples
from diffusion_runtime.backends import TensorSpec
from diffusion_runtime.errors import InputError


def header(text: str) -> bytes:
    """An .npy file with this header and no data."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1")


DAMAGED_ARRAYS = {
    "a header that does not end": header("{'descr': '<f4', 'shape': (3,"),
    "a header of numbers alone": header("3"),
    "a shape of a thousand petabytes": header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**18,), }"),
    "a shape that is no number": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1e400,), }"),
    "objects": header("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }"),
    "a type that is none": header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (3,), }"),
    "deep": header("(" * 60_000),
    "no array": b"text",
    "nothing": b"",
}


@pytest.mark.parametrize("name", DAMAGED_ARRAYS)
def test_damaged_samples_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", DAMAGED_ARRAYS[name])
    specs = {"x": TensorSpec("x", (1, 8, 16, 16), "float32")}
    with pytest.raises(InputError, match=r"samples\.npz: "):
        load_samples(path, specs)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_pipes_devices_and_folders_are_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    """A pipe would be waited for, a device has no end."""
    path = tmp_path / "samples.npz"
    make(path)
    with pytest.raises(
        InputError, match=r"samples\.npz: cannot be read as an \.npz file: it is not a regular file"
    ):
        load_samples(path, {"x": TensorSpec("x", (1, 8), "float32")})


def test_samples_that_unfold_to_more_than_any_model_takes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_MOST_BYTES", 1 << 20)
    path = tmp_path / "samples.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes((1 << 20) + 1))
    assert path.stat().st_size < 5000
    with pytest.raises(InputError, match=r"samples\.npz: unfolds to .* GB, expected at most"):
        load_samples(path, {"x": TensorSpec("x", (1, 8), "float32")})
