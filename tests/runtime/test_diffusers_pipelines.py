"""Converted models inside diffusers' own pipelines: the picture that diffusers makes of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_convert import ConvertOptions, convert
from diffusion_runtime import schedulers
from diffusion_runtime.diffusers import load_diffusers_pipeline
from diffusion_runtime.errors import InputError
from pictures import half_mask, picture

PARITY_DB = 40.0
Load = Callable[[str], Any]
Psnr = Callable[[Any, Any], float]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "class_name", "given"),
    [
        ("sd1", None, "StableDiffusionPipeline", {}),
        ("sd1", "text-to-image", "StableDiffusionPipeline", {"prompt": ["a cat", "a dog", "a red circle"]}),
        ("sd1", None, "StableDiffusionPipeline", {"guidance_scale": 1.0}),
        ("sd1", "image-to-image", "StableDiffusionImg2ImgPipeline", {"image": picture(64), "strength": 0.7}),
        ("sd1", "inpainting", "StableDiffusionInpaintPipeline", {"image": picture(64), "mask_image": half_mask()}),
        ("sd2-v", None, "StableDiffusionPipeline", {}),
        ("sd1-lcm", None, "StableDiffusionPipeline", {"guidance_scale": 9.0}),
        ("sdxl-v-zero-snr", None, "StableDiffusionXLPipeline", {"guidance_rescale": 0.7}),
        (
            "sd1-inpainting",
            None,
            "StableDiffusionInpaintPipeline",
            {"image": picture(64), "mask_image": half_mask()},
        ),
        ("sdxl", None, "StableDiffusionXLPipeline", {"negative_prompt": "red"}),
        ("sdxl", None, "StableDiffusionXLPipeline", {"prompt": ["a cat", "a dog"], "original_size": (96, 80)}),
        ("sdxl", "image-to-image", "StableDiffusionXLImg2ImgPipeline", {"image": picture(128), "strength": 0.7}),
        (
            "sdxl",
            "inpainting",
            "StableDiffusionXLInpaintPipeline",
            {"image": picture(128), "mask_image": half_mask(128)},
        ),
        (
            "sdxl-inpainting",
            None,
            "StableDiffusionXLInpaintPipeline",
            {"image": picture(128), "mask_image": half_mask(128)},
        ),
        ("sdxl-refiner", None, "StableDiffusionXLImg2ImgPipeline", {"image": picture(128), "aesthetic_score": 7.0}),
        ("sd2-depth", None, "StableDiffusionDepth2ImgPipeline", {"image": picture(64), "strength": 0.8}),
        ("x4-upscaler", None, "StableDiffusionUpscalePipeline", {"image": picture(8), "noise_level": 30}),
        ("sd1-pix2pix", None, "StableDiffusionInstructPix2PixPipeline", {"image": picture(64)}),
        ("sdxl-pix2pix", "editing", "StableDiffusionXLInstructPix2PixPipeline", {"image": picture(128)}),
    ],
)
def test_the_picture_is_diffusers_own(
    reference: Load,
    converted: Callable[[str], Path],
    psnr_db: Psnr,
    family: str,
    task: str | None,
    class_name: str,
    given: dict[str, Any],
) -> None:
    import diffusers

    own = reference(family)
    scored = {"requires_aesthetics_score": True} if family == "sdxl-refiner" else {}
    theirs = getattr(diffusers, class_name)(**own.diffusers.components, **scored)
    if family.startswith("sdxl"):
        theirs.register_to_config(force_zeros_for_empty_prompt=own.diffusers.config.force_zeros_for_empty_prompt)
    theirs.scheduler = schedulers.build(
        json.loads((own.folder / "scheduler" / "scheduler_config.json").read_text()), "ddim"
    )
    ours = load_diffusers_pipeline(converted(family), task, "torch", scheduler="ddim")
    assert type(ours) is getattr(diffusers, class_name)
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, **given}
    found = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        found.append(pipe(**asked, generator=torch.Generator().manual_seed(3)))
    flags = [getattr(result, "nsfw_content_detected", None) for result in found]
    assert flags[0] == flags[1]
    for expected, made in zip(found[0].images, found[1].images, strict=True):
        assert psnr_db(np.asarray(made), np.asarray(expected)) >= PARITY_DB


def test_pictures_need_not_be_square(reference: Load, psnr_db: Psnr, tmp_path: Path) -> None:
    """diffusers' classes for pictures cannot be given a UNet whose size is of two numbers."""
    import diffusers

    own = reference("sd1")
    parts = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    options = ConvertOptions("original", components=parts, height=64, width=96, compiled=False, verify=False)
    convert(own.folder, tmp_path / "models", options)
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**{**own.diffusers.components, "safety_checker": None})
    theirs.scheduler = schedulers.build(
        json.loads((own.folder / "scheduler" / "scheduler_config.json").read_text()), "ddim"
    )
    ours = load_diffusers_pipeline(tmp_path / "models", "image-to-image", "torch", scheduler="ddim")
    expected, found = (
        pipe("a cat", image=picture(96).crop((0, 0, 96, 64)), num_inference_steps=4, generator=torch.manual_seed(3))
        for pipe in (theirs, ours)
    )
    assert psnr_db(np.asarray(found.images[0]), np.asarray(expected.images[0])) >= PARITY_DB
    drawn = load_diffusers_pipeline(tmp_path / "models", backend="torch")("a cat", num_inference_steps=2)
    assert drawn.images[0].size == (96, 64)


def test_callbacks_and_other_schedulers_work(converted: Callable[[str], Path]) -> None:
    import diffusers

    pipe = load_diffusers_pipeline(converted("sd1"), backend="torch")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    seen: list[int] = []

    def at_step_end(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        return tensors

    pipe("a cat", num_inference_steps=3, callback_on_step_end=at_step_end, output_type="latent")
    assert seen == [0, 1, 2]


def test_what_a_converted_model_cannot_do_is_said(converted: Callable[[str], Path]) -> None:
    pipe = load_diffusers_pipeline(converted("sd1"), backend="torch")
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cpu")
    failing: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: pipe.to("cuda"), "cannot be moved to cuda"),
        (lambda: pipe.to(torch.float16), r"cannot become torch\.float16"),
        (lambda: pipe("a cat", height=128, width=128, num_inference_steps=1), "has fixed sizes: sample"),
        (lambda: pipe("a cat", clip_skip=1, num_inference_steps=1), "clip_skip"),
        (lambda: pipe("a cat", cross_attention_kwargs={"scale": 0.5}, num_inference_steps=1), "cross_attention_kw"),
        (pipe.unet.train, "cannot be trained"),
        (lambda: pipe.unet(torch.zeros(1, 4, 8, 8, requires_grad=True), 1, torch.zeros(1, 77, 32)), "no gradients"),
        (lambda: pipe.unet.save_pretrained("there"), "cannot be saved"),
        (lambda: load_diffusers_pipeline(converted("sd1"), "upscaling", "torch"), "can do text-to-image"),
    )
    for fails, message in failing:
        with pytest.raises(InputError, match=message) as caught:
            fails()
        assert "\n" not in str(caught.value)
