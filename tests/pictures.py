"""Pictures to start from."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(size: int = 64, seed: int = 0) -> Image.Image:
    """A smooth coloured picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def half_mask(size: int = 64) -> Image.Image:
    """White on the right half."""
    return Image.fromarray(np.repeat((np.arange(size) >= size // 2)[None] * np.uint8(255), size, axis=0), "L")
