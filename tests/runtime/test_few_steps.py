"""The shapes checkpoint with the LoRA that was distilled from it: four LCM steps without guidance show what the
prompt says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_convert import ConvertOptions, convert
from diffusion_runtime import load_pipeline
from diffusion_runtime.pipeline import Pipeline
from judge_shapes import Caption, judge

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
SHAPES, LORA = CHECKPOINTS / "shapes", CHECKPOINTS / "shapes-lcm"
MAX_BYTES = 1_000_000
PARITY_DB = 40.0
pytestmark = pytest.mark.slow

SAMPLING: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}
CAPTIONS = (
    Caption("circle", "red", "large", "white"),
    Caption("square", "blue", "small", "yellow"),
    Caption("triangle", "green", "large", "black"),
    Caption("cross", "purple", "small", "white"),
    Caption("star", "yellow", "large", "blue"),
    Caption("circle", "white", "small", "black"),
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    models = tmp_path_factory.mktemp("few-steps") / "models"
    options = ConvertOptions(
        attention="original", loras=str(LORA), batch_size=1, compiled=False, zip=False, verify=False
    )
    convert(SHAPES, models, options)
    return load_pipeline(models, "torch", scheduler="lcm", check_safety=False)


@pytest.fixture(scope="module")
def theirs() -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        str(SHAPES), dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipe.load_lora_weights(LORA)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_lora_is_small() -> None:
    assert sum(path.stat().st_size for path in LORA.glob("*.safetensors")) <= MAX_BYTES


def test_four_steps_show_what_the_prompts_say(pipeline: Pipeline) -> None:
    for caption in CAPTIONS:
        picture = pipeline(caption.text, seed=1, **SAMPLING).images[0]
        assert judge(picture).shows(caption), caption.text


def test_without_the_lora_they_do_not(theirs: Any) -> None:
    """Four steps are too few for the checkpoint alone, so that what is right above is the LoRA's doing."""
    theirs.disable_lora()
    try:
        made = [theirs(c.text, generator=torch.Generator().manual_seed(1), **SAMPLING).images[0] for c in CAPTIONS]
    finally:
        theirs.enable_lora()
    right = [judge(picture).shows(caption) for picture, caption in zip(made, CAPTIONS, strict=True)]
    assert sum(right) <= len(CAPTIONS) // 2


def test_the_pictures_are_diffusers(pipeline: Pipeline, theirs: Any, psnr_db: Any) -> None:
    caption = CAPTIONS[1].text
    expected = theirs(caption, generator=torch.Generator().manual_seed(1), **SAMPLING).images[0]
    ours = pipeline(caption, seed=1, **SAMPLING).images[0]
    assert psnr_db(np.asarray(ours), np.asarray(expected)) >= PARITY_DB
