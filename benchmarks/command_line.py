"""What the benchmarks' command lines have in common: what is wrong with one is said in a line, and so is what the
product refuses."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from diffusion_runtime.errors import DiffusionError


def package(text: str) -> Path:
    """An .mlpackage that is there."""
    if not (Path(text) / "Manifest.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: no package; `python benchmarks/full_size.py FOLDER` makes FOLDER/unet.mlpackage"
        )
    return Path(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return int(text)


def run(main: Callable[[], int | None]) -> None:
    """End the process with what ``main`` returns; with a line and status 2 for what the product or the disk
    refuses, and where a process of its own has failed, which said why."""
    try:
        status = main()
    except subprocess.CalledProcessError as error:
        print(f"error: a measurement ended with status {error.returncode}: see above", file=sys.stderr)
        status = 2
    except (DiffusionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
