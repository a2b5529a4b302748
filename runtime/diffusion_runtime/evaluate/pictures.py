"""Pictures to be measured: those of a folder, and those that a batch has made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_runtime import images
from diffusion_runtime.batch.places import RESULTS
from diffusion_runtime.errors import InputError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})


@dataclass(frozen=True, slots=True)
class Made:
    """One picture of a batch: its file, what it should show, and whether the safety checker has flagged it."""

    path: Path
    prompt: str
    flagged: bool


def reference_files(folder: Path) -> list[Path]:
    """The pictures of a folder and of those in it, by name. Raises InputError where there are none."""
    if not folder.is_dir():
        raise InputError(f"--reference-images {folder}: no such folder")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not any(part.startswith(".") for part in path.parts)
    )
    if not found:
        raise InputError(f"--reference-images {folder}: holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    return found


def load(paths: Sequence[Path], what: str) -> Iterator[Image.Image]:
    """Raises InputError for one that cannot be read, naming it."""
    return (images.load(path, what) for path in paths)


def of_batch(folder: Path) -> list[Made]:
    """What results.jsonl of a finished batch says, in the order of the rows."""
    lines = map(json.loads, (folder / RESULTS).read_text(encoding="utf-8").splitlines())
    return [Made(folder / line["file"], line["input"]["prompt"], bool(line["flagged"])) for line in lines]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of pictures that were made with the same prompts and seeds: ``psnr_db`` of their mean squared error in all,
    None where every picture is ``identical``, or none could be compared."""

    psnr_db: float | None
    identical: int


def paired(first: Sequence[Made], other: Sequence[Made]) -> Difference:
    """Of the pictures that are flagged on neither side. Raises InputError where their sizes differ."""
    errors = []
    for one, two in zip(first, other, strict=True):
        if one.flagged or two.flagged:
            continue
        left, right = (np.asarray(images.load(made.path, "picture"), np.float64) for made in (one, two))
        if left.shape != right.shape:
            raise InputError(
                f"{one.path} and {two.path}: {left.shape[1]}x{left.shape[0]} and {right.shape[1]}x{right.shape[0]} "
                "pixels: models to be compared must draw pictures of one size"
            )
        errors.append(float(np.mean((left - right) ** 2)))
    mean = float(np.mean(errors)) if errors else 0.0
    return Difference(10 * math.log10(255.0**2 / mean) if mean else None, errors.count(0.0))
