"""Files that two folders share: hard links where the file system has them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def share_file(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def share_tree(source: Path, target: Path) -> None:
    """The folder ``source`` once more: its files as hard links where the file system has them, else as copies."""
    try:
        shutil.copytree(source, target, copy_function=_link)
    except (OSError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


def _link(source: str, target: str) -> None:
    os.link(os.path.realpath(source), target)  # Linux would link a symbolic link itself
