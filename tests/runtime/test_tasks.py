"""Every task against diffusers' own pipeline for it: same weights, same seed, same picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_runtime import schedulers, tasks
from diffusion_runtime.errors import InputError
from diffusion_runtime.models import Models
from diffusion_runtime.pipeline import Pipeline, RuntimeNote
from pictures import half_mask, picture

PARITY_DB = 40.0
PROMPT = "a photo of a cat"
Load = Callable[[str], Any]
Psnr = Callable[[Any, Any], float]


def arrays(images: Any) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


def both(
    reference: Any, pipeline_class: str, scheduler: str = "ddim", pictures: int = 1, **given: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Pictures of ours and of ``diffusers.<pipeline_class>`` for the same request."""
    import diffusers

    parts = dict(reference.diffusers.components)
    if "safety_checker" in parts:
        parts["safety_checker"] = None
    theirs = getattr(diffusers, pipeline_class)(**parts)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = schedulers.build(reference.manifest(2).scheduler, scheduler)
    asked: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "red", "guidance_scale": 7.5}
    asked |= {"num_inference_steps": 6, "num_images_per_prompt": pictures}
    expected = theirs(**asked, **given, generator=torch.Generator().manual_seed(3)).images
    ours = reference.pipeline(scheduler=scheduler, check_safety=False)
    result = ours(**asked, **given, generator=torch.Generator().manual_seed(3))
    return arrays(result.images), arrays(expected)


def worst_db(psnr_db: Psnr, pair: tuple[list[np.ndarray], list[np.ndarray]]) -> float:
    ours, expected = pair
    assert len(ours) == len(expected)
    return min(psnr_db(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize(
    ("scheduler", "strength"), [("ddim", 0.8), ("pndm", 0.55), ("euler", 1.0), ("heun", 0.5), ("dpm++ 2m sde", 0.6)]
)
def test_image_to_image(reference: Load, psnr_db: Psnr, scheduler: str, strength: float) -> None:
    pair = both(
        reference("sd1"),
        "StableDiffusionImg2ImgPipeline",
        scheduler,
        pictures=2,
        image=picture(),
        strength=strength,
    )
    assert worst_db(psnr_db, pair) >= PARITY_DB


@pytest.mark.parametrize("family", ["sd1-inpainting", "sd2-inpainting"])
@pytest.mark.parametrize(("scheduler", "strength"), [("ddim", 1.0), ("euler-ancestral", 0.7)])
def test_inpainting_that_sees_the_surroundings(
    reference: Load, psnr_db: Psnr, family: str, scheduler: str, strength: float
) -> None:
    given: dict[str, Any] = {"image": picture(), "mask_image": half_mask(), "strength": strength}
    pair = both(reference(family), "StableDiffusionInpaintPipeline", scheduler, **given)
    assert worst_db(psnr_db, pair) >= PARITY_DB


@pytest.mark.parametrize(("scheduler", "strength"), [("ddim", 1.0), ("pndm", 0.7), ("euler-ancestral", 0.6)])
def test_inpainting_by_blending(reference: Load, psnr_db: Psnr, scheduler: str, strength: float) -> None:
    given: dict[str, Any] = {"image": picture(), "mask_image": half_mask(), "strength": strength}
    pair = both(reference("sd1"), "StableDiffusionInpaintPipeline", scheduler, pictures=2, **given)
    assert worst_db(psnr_db, pair) >= PARITY_DB


@pytest.mark.parametrize(("family", "strength"), [("sd1-inpainting", 0.6), ("sd1-inpainting", 1.0), ("sd1", 0.7)])
def test_inpainting_from_given_noise(reference: Load, psnr_db: Psnr, family: str, strength: float) -> None:
    """With a scheduler that draws noise itself: what it draws follows what was drawn before."""
    given: dict[str, Any] = {"image": picture(), "mask_image": half_mask(), "strength": strength}
    given["latents"] = torch.randn(1, 4, *reference(family).latent_size, generator=torch.Generator().manual_seed(8))
    pair = both(reference(family), "StableDiffusionInpaintPipeline", "euler-ancestral", **given)
    assert worst_db(psnr_db, pair) >= PARITY_DB


def test_noise_for_inpainting_that_does_not_fit_is_refused(reference: Load) -> None:
    with pytest.raises(InputError, match=r"latents have shape \(1, 4, 3, 3\)"):
        reference("sd1").pipeline()(
            PROMPT, image=picture(), mask_image=half_mask(), latents=torch.zeros(1, 4, 3, 3)
        )


@pytest.mark.parametrize("given_depth", [False, True])
def test_depth_to_image(reference: Load, psnr_db: Psnr, given_depth: bool) -> None:
    depth: dict[str, Any] = (
        {"depth_map": torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))} if given_depth else {}
    )
    pair = both(reference("sd2-depth"), "StableDiffusionDepth2ImgPipeline", image=picture(), **depth)
    assert worst_db(psnr_db, pair) >= PARITY_DB


@pytest.mark.parametrize("noise_level", [0, 20, 350])
def test_upscaling(reference: Load, psnr_db: Psnr, noise_level: int) -> None:
    upscaler = reference("x4-upscaler")
    given: dict[str, Any] = {"image": picture(upscaler.latent_size[0]), "noise_level": noise_level}
    ours, expected = both(upscaler, "StableDiffusionUpscalePipeline", **given)
    assert ours[0].shape[0] == 4 * upscaler.latent_size[0]
    assert worst_db(psnr_db, (ours, expected)) >= PARITY_DB


@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 104)])
@pytest.mark.parametrize("masked", [False, True])
def test_pictures_that_are_not_square(
    reference: Load, psnr_db: Psnr, height: int, width: int, masked: bool
) -> None:
    oblong = reference("sd1").of_size(height, width)
    given: dict[str, Any] = {"image": picture().resize((width, height)), "strength": 0.7}
    if masked:
        mask = Image.new("L", (width, height), 255)
        mask.paste(0, (0, 0, width // 2, height // 4))
        given |= {"mask_image": mask, "height": height, "width": width}
    name = "StableDiffusionInpaintPipeline" if masked else "StableDiffusionImg2ImgPipeline"
    pair = both(oblong, name, **given)
    assert pair[0][0].shape == (height, width, 3)
    assert worst_db(psnr_db, pair) >= PARITY_DB


def test_what_is_black_in_the_mask_stays(reference: Load, psnr_db: Psnr) -> None:
    sd1 = reference("sd1")
    given = {"image": picture(), "mask_image": half_mask(), "num_inference_steps": 6, "seed": 1}
    first, second = (
        arrays(sd1.pipeline(check_safety=False)(prompt, **given, output_type="latent").images)[0]
        for prompt in ("a cat", "a horse")
    )
    assert np.array_equal(first[:, :, :4], second[:, :, :4])
    assert not np.array_equal(first[:, :, 4:], second[:, :, 4:])


def test_inputs_of_another_size_are_resized_with_a_note(reference: Load) -> None:
    pipeline = reference("sd1").pipeline(check_safety=False)
    wide = picture(96).resize((96, 48))
    with pytest.warns(RuntimeNote, match="resized from") as notes:
        result = pipeline(PROMPT, image=wide, mask_image=half_mask(32), num_inference_steps=2, seed=1)
    assert result.images[0].size == (64, 64)
    assert {str(note.message) for note in notes} >= {
        "the image was resized from 96x48 to 64x64, which these models take",
        "the mask was resized from 32x32 to 64x64, which these models take",
    }


@pytest.mark.parametrize(
    ("channels", "given", "name"),
    [
        (4, set(), "text to image"),
        (4, {"image"}, "image to image"),
        (4, {"image", "strength"}, "image to image"),
        (4, {"image", "mask"}, "in-painting by blending"),
        (9, {"image", "mask"}, "in-painting"),
        (5, {"image"}, "depth to image"),
        (5, {"image", "depth"}, "depth to image"),
        (7, {"image"}, "upscaling"),
    ],
)
def test_the_task_follows_from_models_and_what_is_given(channels: int, given: set[str], name: str) -> None:
    assert tasks.choose(channels, given).name == name


@pytest.mark.parametrize(
    ("channels", "given", "message"),
    [
        (9, set(), "given a prompt alone, but these models do in-painting: --image and --mask"),
        (4, {"mask"}, "given a mask, but these models do text to image"),
        (4, {"image", "depth"}, "given an image and a depth"),
        (4, {"image", "noise_level"}, "given an image and a noise level, but these models do"),
        (4, {"image", "latents"}, "given an image and latents, but these models do"),
        (7, {"image", "strength"}, "given an image and a strength, but these models do upscaling"),
        (7, set(), "upscaling: --image"),
        (6, {"image"}, "the UNet takes 6 channels, and no task is known for that"),
    ],
)
def test_what_does_not_fit_is_said(channels: int, given: set[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.choose(channels, given)
    assert message in str(caught.value)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, float("nan"), 0.01])
def test_strength_that_leaves_nothing_to_do_is_refused(reference: Load, strength: float) -> None:
    with pytest.raises(InputError, match=f"strength {strength}"):
        reference("sd1").pipeline()(PROMPT, image=picture(), strength=strength, num_inference_steps=10)


@pytest.mark.parametrize("level", [-1, 351])
def test_noise_levels_end(reference: Load, level: int) -> None:
    with pytest.raises(InputError, match=f"noise level {level}: expected 0 to 350"):
        reference("x4-upscaler").pipeline()(PROMPT, image=picture(8), noise_level=level)


def test_a_black_mask_is_refused(reference: Load) -> None:
    black = Image.new("L", (64, 64))
    with pytest.raises(InputError, match="mask is black all over"):
        reference("sd1").pipeline()(PROMPT, image=picture(), mask_image=black)


def test_flat_depth_is_refused(reference: Load) -> None:
    with pytest.raises(InputError, match="depth is the same all over"):
        reference("sd2-depth").pipeline()(PROMPT, image=picture(), depth_map=torch.ones(1, 8, 8))


@pytest.mark.parametrize(("family", "lacking"), [("sd1", "vae_encoder"), ("sd2-depth", "depth_estimator")])
def test_a_model_that_is_lacking_is_named(reference: Load, family: str, lacking: str) -> None:
    whole = reference(family).pipeline()
    loads = {name: load for name, load in whole.models.loads.items() if name != lacking}
    with pytest.raises(InputError, match=f"no {lacking}"):
        Pipeline(whole.manifest, Models(loads), whole.tokenizer)(PROMPT, image=picture(), num_inference_steps=2)
