"""The trained checkpoint from source to zip: every form of the result draws the same picture, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusion_convert import AttentionKind, ConvertOptions, convert
from diffusion_runtime import load_pipeline, zips

SHAPES = Path(__file__).parent / "checkpoints" / "shapes"


@pytest.mark.slow
def test_packages_compiled_models_and_zips_give_the_same_bits(tmp_path: Path) -> None:
    models = tmp_path / "models"
    convert(SHAPES, models, ConvertOptions(attention=(AttentionKind.ORIGINAL,)))
    (packed,) = models.glob("*_original_compiled.zip")
    unpacked = zips.unpack(packed, tmp_path / "unpacked")
    pictures = [
        np.asarray(
            load_pipeline(place, backend="torch")("a small blue square", num_inference_steps=4, seed=3).images[0]
        )
        for place in (models / "original" / "packages", models / "original" / "compiled", unpacked)
    ]
    assert pictures[0].any()
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()
