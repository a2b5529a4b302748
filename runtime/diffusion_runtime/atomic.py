"""Results that appear whole or not at all: made beside their place under a hidden name and renamed last."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_runtime.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """An empty folder that becomes ``path``, replacing an older one, when the block ends well; else it vanishes.

    Raises InputError where ``path`` cannot be a folder or be written to, and for a full disk.
    """
    unfinished, replaced = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.replaced")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; expected a folder or nothing there")
    shutil.rmtree(unfinished, ignore_errors=True)
    _make(unfinished, path)
    try:
        with disk_errors(path):
            yield unfinished
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, renamed to it when the block ends well, else removed. Raises InputError
    as ``unfinished_folder`` does."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file or nothing there")
    _make(path.parent, path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with disk_errors(path):
            yield unfinished
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Make an InputError, which names ``path``, of what the disk refuses: it is full, or must not be written to."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InputError(f"{path}: the disk is full; free some room and try again") from error
        if error.errno in _NOT_WRITABLE:
            raise InputError(f"{path}: cannot be written: {error.strerror} ({error.filename})") from error
        raise


def share_file(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _make(folder: Path, path: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror} ({error.filename})") from error
