"""The trained checkpoint from source to zip: every form of the result draws the same picture, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffusion_convert import AttentionKind, ConvertOptions, convert
from diffusion_runtime import load_pipeline, zips

SHAPES = Path(__file__).parent / "checkpoints" / "shapes"


@pytest.mark.slow
def test_packages_compiled_models_and_zips_give_the_same_bits(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    models = shutil.copytree(converted("shapes", compiled=True), tmp_path / "models")
    convert(SHAPES, models, ConvertOptions(attention=(AttentionKind.ORIGINAL,)))  # adds the zip
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


def test_clip_weights_have_the_published_names() -> None:
    """As SD 1.5's files have them: transformers before version 5 finds no weight without, and goes on with random
    ones. What is in them loads without a rest in the version that is installed, too."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from safetensors import safe_open
    from transformers import CLIPTextModel

    stored = {}
    for part in ("text_encoder", "safety_checker"):
        with safe_open(SHAPES / part / "model.safetensors", "pt") as file:
            stored[part] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(name.startswith("text_model.") for name in stored["text_encoder"])
    own = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")
    inner = stored["safety_checker"].keys() - {*own, "visual_projection.weight"}
    assert all(name.startswith("vision_model.vision_model.") for name in inner)
    for part, prefix, count in (
        ("text_encoder", "text_model", 77),
        ("safety_checker", "vision_model.vision_model", 50),
    ):
        positions = stored[part][f"{prefix}.embeddings.position_ids"]
        assert positions.tolist() == [list(range(count))]
    for network, part in ((CLIPTextModel, "text_encoder"), (StableDiffusionSafetyChecker, "safety_checker")):
        _, told = network.from_pretrained(SHAPES / part, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["mismatched_keys"]
