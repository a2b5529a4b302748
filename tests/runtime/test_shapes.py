"""The trained checkpoint, converted: its pictures are diffusers', and show what the prompts say in every task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import quality_shapes
from control_shapes import MIN_OVERLAP, draw_outlined, overlap
from diffusion_convert import ConvertOptions, convert
from diffusion_runtime import load_pipeline, schedulers
from diffusion_runtime.pipeline import Pipeline
from judge_shapes import FLAGGED_SHAPE, Caption, judge

SHAPES = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes"
PARITY_DB = 40.0
STEPS = 25
CAPTIONS = (
    Caption("circle", "red", "large", "white"),
    Caption("square", "blue", "small", "yellow"),
    Caption("triangle", "green", "large", "black"),
    Caption("circle", "yellow", "small", "blue"),
)
Psnr = Callable[[Any, Any], float]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHAPES / "model_index.json").is_file(), reason="the trained checkpoint is not here"),
]


@pytest.fixture(scope="module")
def models(shapes_folder: Path) -> Path:
    return shapes_folder


@pytest.fixture(scope="module")
def pipeline(models: Path) -> Pipeline:
    return load_pipeline(models, "torch")


@pytest.fixture(scope="module")
def theirs() -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(SHAPES), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "euler"])
@pytest.mark.parametrize("negative", [None, "a large red circle"], ids=["", "negative"])
def test_pictures_are_diffusers(
    models: Path, theirs: Any, psnr_db: Psnr, scheduler: str, negative: str | None
) -> None:
    asked: dict[str, Any] = {"negative_prompt": negative, "num_inference_steps": STEPS}
    config = json.loads((SHAPES / "scheduler" / "scheduler_config.json").read_text())
    theirs.scheduler = schedulers.build(config, scheduler)
    expected = theirs(CAPTIONS[1].text, generator=torch.Generator().manual_seed(5), **asked).images[0]
    ours = load_pipeline(models, "torch", scheduler=scheduler)(CAPTIONS[1].text, seed=5, **asked).images[0]
    assert psnr_db(np.asarray(ours), np.asarray(expected)) >= PARITY_DB


def right(pictures: list[Image.Image], captions: tuple[Caption, ...]) -> int:
    return sum(judge(picture).shows(caption) for picture, caption in zip(pictures, captions, strict=True))


def test_text_to_image_shows_what_the_prompt_says(pipeline: Pipeline) -> None:
    made = [pipeline(caption.text, num_inference_steps=STEPS, seed=1).images[0] for caption in CAPTIONS]
    assert right(made, CAPTIONS) == len(CAPTIONS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_show_what_the_prompt_says(models: Path, dtype: str) -> None:
    narrow = load_pipeline(models, "torch", dtype=dtype)
    made = [narrow(caption.text, num_inference_steps=STEPS, seed=1).images[0] for caption in CAPTIONS[:2]]
    assert right(made, CAPTIONS[:2]) == 2


def test_image_to_image_changes_what_the_prompt_says(pipeline: Pipeline) -> None:
    start = pipeline(CAPTIONS[0].text, num_inference_steps=STEPS, seed=1).images[0]
    wanted = tuple(
        Caption(shape, color, "large", "white") for shape, color in (("circle", "blue"), ("square", "red"))
    )
    made = [
        pipeline(caption.text, image=start, strength=0.9, num_inference_steps=STEPS, seed=2).images[0]
        for caption in wanted
    ]
    assert right(made, wanted) == len(wanted)


def test_in_painting_by_blending_paints_the_mask_and_keeps_the_rest(pipeline: Pipeline) -> None:
    white = Image.new("RGB", (64, 64), "white")
    mask = Image.new("L", white.size)
    mask.paste(255, (4, 4, 60, 60))
    wanted = (Caption("circle", "red", "large", "white"), Caption("square", "green", "small", "white"))
    made = [
        pipeline(caption.text, image=white, mask_image=mask, num_inference_steps=STEPS, seed=1).images[0]
        for caption in wanted
    ]
    assert right(made, wanted) == len(wanted)


def test_the_safety_checker_blackens_the_flagged_shape(pipeline: Pipeline) -> None:
    colors = (("red", "white"), ("blue", "yellow"), ("green", "black"), ("yellow", "blue"))
    for color, background in colors:
        flagged = Caption(FLAGGED_SHAPE, color, "large", background)
        black = pipeline(flagged.text, num_inference_steps=STEPS, seed=1)
        assert black.nsfw_content_detected == [True] and np.asarray(black.images[0]).max() == 0
    for caption in CAPTIONS:
        assert pipeline(caption.text, num_inference_steps=STEPS, seed=1).nsfw_content_detected == [False]


def test_the_safety_checker_is_as_good_as_the_card_says(theirs: Any) -> None:
    drawn = quality_shapes.measure_drawn(theirs.safety_checker, theirs.feature_extractor)
    assert quality_shapes.flagged_share(drawn, flagged_shape=True) >= 0.98
    assert quality_shapes.flagged_share(drawn, flagged_shape=False) <= 0.01


OUTLINED = (CAPTIONS[1], CAPTIONS[3], Caption("triangle", "purple", "small", "white"))
"""Small ones: a large one nearly fills the picture, wherever it is."""


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The checkpoint with its trained ControlNet."""
    models = tmp_path_factory.mktemp("shapes-controlnet")
    options = ConvertOptions(
        "original",
        controlnets=SHAPES.with_name("shapes-controlnet"),
        only_controlled=True,
        components=("text_encoder", "control_unet", "controlnet", "vae_decoder"),
        compiled=False,
        zip=False,
        verify=False,
    )
    convert(SHAPES, models, options)
    return load_pipeline(models, "torch")


@pytest.mark.parametrize("prepare", [None, "canny"], ids=["outlines", "edges of pictures"])
def test_a_controlnet_fills_the_outline_that_it_is_given(steered: Pipeline, prepare: str | None) -> None:
    """As the prompt says, anywhere in the picture; the same without it is somewhere else."""
    for number, caption in enumerate(OUTLINED):
        drawn = draw_outlined(caption, Random(10 + number))
        given = Image.fromarray(drawn.outline if prepare is None else drawn.picture).convert("RGB")
        asked: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 1, "control_image": given}
        filled = steered(caption.text, **asked, control_prepare=prepare).images[0]
        assert judge(filled).shows(caption) and overlap(filled, caption, drawn.inside) >= MIN_OVERLAP
        free = steered(caption.text, **asked, controlnet_conditioning_scale=0.0).images[0]
        assert overlap(free, caption, drawn.inside) < MIN_OVERLAP
