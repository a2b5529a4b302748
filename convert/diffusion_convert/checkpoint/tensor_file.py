"""One file of named tensors, .safetensors or pickled, told apart by content and not by name."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_convert.checkpoint import unpickle
from diffusion_convert.checkpoint.computed import TensorFile
from diffusion_runtime.errors import CheckpointError

_TORCH_MAGICS = (b"PK", b"\x80")
"""What zips and pickles begin with."""
GGUF_MAGIC = b"GGUF"
_LFS_MAGIC = b"version https://git-lfs"
_PAGEOUT = 21
"""Linux' advice MADV_PAGEOUT, which `mmap` does not name. Unlike MADV_DONTNEED it keeps what was written to the
pages, so that it may be given for memory of any kind: a fused weight is not in a file. It takes files out of the
system's cache, too, to be read from the disk again."""


_LARGE_BYTES = 2**26
"""Of a file, from which on its tensors of fewer than `_SMALL_BYTES` are read alone."""
_SMALL_BYTES = 2**20


def below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def read(path: Path) -> TensorFile:
    """Map the tensors of a file; no values are read. Raises CheckpointError for anything else."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device has no end
        raise CheckpointError(f"{path}: is no file of tensors: it is not a regular file")
    try:
        with path.open("rb") as file:
            magic = file.read(len(_LFS_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if magic == _LFS_MAGIC:
        raise CheckpointError(f"{path}: is Git LFS's note of a file, not the file: fetch it with `git lfs pull`")
    if magic.startswith(GGUF_MAGIC):
        raise CheckpointError(f"{path}: is a GGUF file, which is read as a checkpoint's UNet only")
    safetensors = magic[8:9] == b"{"  # after the header's length, which may begin like anything
    pickled = magic.startswith(_TORCH_MAGICS) or path.suffix in (".ckpt", ".pt", ".bin", ".pth")
    if pickled and not safetensors:
        return unpickle.load(path)
    return _read_safetensors(path)


def let_go(tensor: torch.Tensor) -> None:
    """Have the system take back the memory of a ``tensor`` that lies in a mapped file, or it fills up with what was
    read once; it is read anew where it is needed again. Nothing where the system cannot."""
    if tensor.nbytes >= mmap.PAGESIZE and sys.platform == "linux":
        _advise(tensor, mmap.MADV_DONTNEED if _is_as_in_file(*_pages(tensor)) else _PAGEOUT)


def expect(tensor: torch.Tensor) -> None:
    """Have the system read a ``tensor`` of a mapped file from the disk while something else is computed."""
    if tensor.nbytes >= mmap.PAGESIZE and sys.platform == "linux":
        _advise(tensor, mmap.MADV_WILLNEED)


def _in_small_parts(file: Any, path: Path) -> bool:
    """Have the system read of a mapped file what is asked for alone: where it does not hold the file, it would read
    some megabytes around each page, and so all of it while it is opened. Returns whether it was told."""
    if sys.platform != "linux" or path.stat().st_size < _LARGE_BYTES:
        return False
    places = (file.get_tensor(name).data_ptr() for name in file.offset_keys())
    with path.open("rb") as opened:
        before = 8 + int.from_bytes(opened.read(8), "little")  # the header's length, the header
    start = next(filter(None, places), 0) - before  # an empty tensor lies nowhere
    if start <= 0 or start % mmap.PAGESIZE:
        return False
    size = ctypes.c_size_t(path.stat().st_size)
    return bool(_system().madvise(ctypes.c_void_p(start), size, mmap.MADV_RANDOM) == 0)


def _read_ahead(tensors: Iterable[torch.Tensor]) -> None:
    """Have the system read the large ones of a file as a whole, and small ones alone. These come last: a page that
    one shares with a large one is read alone, too."""
    by_size = sorted(tensors, key=lambda tensor: tensor.nbytes, reverse=True)
    for tensor in by_size:
        if tensor.nbytes:
            _advise(tensor, mmap.MADV_NORMAL if tensor.nbytes >= _SMALL_BYTES else mmap.MADV_RANDOM)


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the pages begin that ``tensor`` lies in, and bytes from there to its end."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return start, tensor.data_ptr() + tensor.nbytes - start


def _advise(tensor: torch.Tensor, advice: int) -> None:
    start, size = _pages(tensor)
    _system().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def _is_as_in_file(start: int, size: int) -> bool:
    """Whether no page of that memory is the process's own, as it would be where it was written to."""
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(start // mmap.PAGESIZE * 8)
            found = pagemap.read(-(-size // mmap.PAGESIZE) * 8)
    except OSError:  # where a container hides it
        return False
    # Each page's three highest bits: it is in memory, it is swapped, it is a file's.
    kinds = np.frombuffer(found, np.uint64) >> np.uint64(61)
    of_file, own = kinds % 2 == 1, (kinds != 0) & (kinds % 2 == 0)
    # Some must be seen to be a file's: where nothing is told, nothing may be given up.
    return kinds.size * mmap.PAGESIZE >= size and bool(of_file.any()) and not bool(own.any())


@cache
def _system() -> Any:
    return ctypes.CDLL(None)


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            in_small_parts = _in_small_parts(file, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if in_small_parts:
                _read_ahead(tensors.values())
            return TensorFile(tensors, dict(file.metadata() or {}))
    except (SafetensorError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        if os.strerror(errno.ENOMEM) in str(error):  # torch has no error of its own for it
            raise CheckpointError(f"{path}: no memory is left to map it") from error
        raise CheckpointError(
            f"{path}: damaged, or no file of tensors: expected a whole .safetensors or .ckpt file"
        ) from error
