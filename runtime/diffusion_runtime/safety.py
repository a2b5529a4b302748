"""Preprocessing for the safety checker, and reading its verdict."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffusion_runtime.models import Timed

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_input(image: Image.Image, size: int = 224) -> np.ndarray:
    """float32 (1, 3, size, size): what transformers' CLIPImageProcessor makes of a picture: the shorter edge to
    ``size`` by bicubic interpolation, the centre cut out, CLIP's mean and deviation (not ImageNet's)."""
    width, height = image.size
    short = min(width, height)
    scaled = (int(size * width / short), int(size * height / short))
    resized = image.convert("RGB").resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    values = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / 255.0
    normal = (values - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return normal.transpose(2, 0, 1)[None]


def is_flagged(checker: Timed, picture: np.ndarray) -> bool:
    """Whether the checker flags a picture (height, width, 3) in 0..1.

    Its ``images`` input only passes through, so a checker converted for another size still judges: it is then
    handed zeros. Its ``adjustment`` stays 0."""
    specs = checker.inputs
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    arrays = {
        name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items() if name in ("images", "adjustment")
    }
    if "images" in arrays and specs["images"].takes((1, *picture.shape)):
        arrays["images"] = picture[None].astype(specs["images"].dtype)
    spec = specs["clip_input"]
    arrays["clip_input"] = clip_input(image, spec.shape[-1]).astype(spec.dtype)
    return bool(checker.one("has_nsfw_concepts", **arrays).any())
