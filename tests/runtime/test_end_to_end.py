"""Converted packages, run by the torch backend, against diffusers' own pipelines: the whole way of the data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_runtime import load_pipeline, schedulers
from pictures import half_mask, picture

PARITY_DB = 40.0
PROMPT, NEGATIVE = "a photo of a cat", "red"
Load = Callable[[str], Any]
Psnr = Callable[[Any, Any], float]


def worst_db(
    reference: Any, models: Path, psnr_db: Psnr, pipeline_class: str, scheduler: str, **given: Any
) -> float:
    """Of our picture against that of ``diffusers.<pipeline_class>``, both with their safety checkers."""
    import diffusers

    theirs = getattr(diffusers, pipeline_class)(**reference.diffusers.components)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = schedulers.build(reference.manifest(2).scheduler, scheduler)
    asked: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 7.5, "num_inference_steps": 10, **given}
    expected = theirs(**asked, generator=torch.Generator().manual_seed(3))
    ours = load_pipeline(models, "torch", scheduler=scheduler)(**asked, generator=torch.Generator().manual_seed(3))
    flags = getattr(expected, "nsfw_content_detected", None)
    assert ours.nsfw_content_detected == flags
    return psnr_db(np.asarray(ours.images[0]), np.asarray(expected.images[0]))


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "euler"])
@pytest.mark.parametrize("negative", [{}, {"negative_prompt": NEGATIVE}], ids=["", "negative"])
def test_text_to_image(
    reference: Load, converted: Callable[[str], Path], psnr_db: Psnr, scheduler: str, negative: dict[str, str]
) -> None:
    models = converted("sd1")
    psnr = worst_db(reference("sd1"), models, psnr_db, "StableDiffusionPipeline", scheduler, **negative)
    assert psnr >= PARITY_DB


def test_image_to_image(reference: Load, converted: Callable[[str], Path], psnr_db: Psnr) -> None:
    given: dict[str, Any] = {"image": picture(64), "strength": 0.7}
    models = converted("sd1")
    assert (
        worst_db(reference("sd1"), models, psnr_db, "StableDiffusionImg2ImgPipeline", "ddim", **given) >= PARITY_DB
    )


def test_inpainting_by_blending(reference: Load, converted: Callable[[str], Path], psnr_db: Psnr) -> None:
    given: dict[str, Any] = {"image": picture(64), "mask_image": half_mask()}
    models = converted("sd1")
    assert (
        worst_db(reference("sd1"), models, psnr_db, "StableDiffusionInpaintPipeline", "ddim", **given) >= PARITY_DB
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pipeline_class", "given"),
    [
        ("sd1-inpainting", "StableDiffusionInpaintPipeline", {"image": picture(64), "mask_image": half_mask()}),
        ("sd2-depth", "StableDiffusionDepth2ImgPipeline", {"image": picture(64), "strength": 0.8}),
        ("x4-upscaler", "StableDiffusionUpscalePipeline", {"image": picture(8), "noise_level": 30}),
    ],
)
def test_families_with_tasks_of_their_own(
    reference: Load,
    converted: Callable[[str], Path],
    psnr_db: Psnr,
    family: str,
    pipeline_class: str,
    given: dict[str, Any],
) -> None:
    models = converted(family)
    assert worst_db(reference(family), models, psnr_db, pipeline_class, "ddim", **given) >= PARITY_DB


def test_without_its_manifest_the_folder_makes_the_same_picture(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("manifest.json")
    bare = Path(shutil.copytree(converted("sd1") / "original" / "packages", tmp_path / "bare", ignore=ignored))
    asked: dict[str, Any] = {"num_inference_steps": 4, "seed": 1}
    ours, theirs = (load_pipeline(folder, "torch")(PROMPT, **asked) for folder in (converted("sd1"), bare))
    assert np.array_equal(np.asarray(ours.images[0]), np.asarray(theirs.images[0]))
