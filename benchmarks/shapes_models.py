"""The shapes checkpoint's models, for benchmarks that draw."""

from __future__ import annotations

from pathlib import Path

from diffusion_convert import ConvertOptions, convert

SHAPES = Path(__file__).resolve().parent.parent / "tests" / "checkpoints" / "shapes"


def packages(folder: Path) -> Path:
    """The checkpoint, converted to ``folder`` once."""
    convert(SHAPES, folder, ConvertOptions(attention="original", compiled=False, zip=False, verify=False))
    return folder
