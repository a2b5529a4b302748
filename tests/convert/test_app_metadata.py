"""What apps read of userDefinedMetadata: keys and spellings of GuernikaKit, as its source has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.conversion.metadata import for_guernika, metadata
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.families import AttentionKind

Folder = Callable[[str], Path]
PLAIN = {"prediction_type": "epsilon", "scaling_factor": "0.18215", "timestep_spacing": "leading"}


@pytest.mark.parametrize(
    ("family", "component", "expected"),
    [
        ("sd1", "unet", {**PLAIN, "steps_offset": "1", "set_alpha_to_one": "false"}),
        ("sd1", "text_encoder", {**PLAIN, "steps_offset": "1", "set_alpha_to_one": "false", "hidden_size": "32"}),
        (
            "sd2-v",
            "vae_decoder",
            {**PLAIN, "prediction_type": "v_prediction", "steps_offset": "1", "set_alpha_to_one": "false"},
        ),
        (
            "sdxl-v-zero-snr",
            "text_encoder_2",
            {
                "prediction_type": "v_prediction",
                "scaling_factor": "0.13025",
                "timestep_spacing": "trailing",
                "steps_offset": "1",
                "set_alpha_to_one": "false",
                "hidden_size": "40",
            },
        ),
        # Its pipeline class imposes no offset; StableDiffusionPipeline imposes 1.
        ("sd1-lcm", "unet", {**PLAIN, "steps_offset": "0", "set_alpha_to_one": "true"}),
    ],
)
def test_guernikas_keys(tiny_checkpoint: Folder, family: str, component: str, expected: dict[str, str]) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    assert for_guernika(table()[component], checkpoint) == expected


def test_a_refiner_is_told_by_its_aesthetic_score(tiny_checkpoint: Folder) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("sdxl-refiner")))
    assert for_guernika(table()["unet"], checkpoint)["requires_aesthetics_score"] == "true"


def test_they_describe_the_models_as_they_are(tiny_checkpoint: Folder) -> None:
    opened = open_checkpoint(str(tiny_checkpoint("sd2-v")))
    plan = make_plan(opened, ConvertOptions(AttentionKind.ORIGINAL, fold="prediction"))
    told = metadata(table()["unet"], plan).user_defined
    assert told["prediction_type"] == "epsilon"
    assert told["coreml_sd.family"] == "sd2-v"
