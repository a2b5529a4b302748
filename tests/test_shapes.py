"""The trained checkpoint, converted and run: pictures equal diffusers' own and show what the prompts say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from judge_shapes import FLAGGED_SHAPE, captions, judge
from PIL import Image, ImageDraw

from diffusion_convert import AttentionKind, ConvertOptions, convert
from diffusion_runtime import load_pipeline, zips

if TYPE_CHECKING:
    from diffusion_runtime.pipeline import Pipeline

SHAPES = Path(__file__).parent / "checkpoints" / "shapes"
PARITY_DB = 40.0
STEPS = 25
THEIRS = {"pndm": "PNDMScheduler", "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}
JUDGED = [caption for caption in captions() if caption.shape != FLAGGED_SHAPE][::14]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "models"
    convert(SHAPES, folder, ConvertOptions(attention=(AttentionKind.ORIGINAL,)))
    return folder


@pytest.fixture(scope="module")
def pipeline(models: Path) -> Pipeline:
    return load_pipeline(models, backend="torch", check_safety=False)


@pytest.fixture(scope="module")
def theirs() -> Callable[..., np.ndarray]:
    """diffusers' own pipeline on the same weights; gives the 8-bit picture."""
    import diffusers
    import torch

    own: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        SHAPES, torch_dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    own.set_progress_bar_config(disable=True)

    def draw(scheduler: str, **arguments: Any) -> np.ndarray:
        own.scheduler = getattr(diffusers, THEIRS[scheduler]).from_config(own.scheduler.config)
        generator = torch.Generator().manual_seed(arguments.pop("seed"))
        return np.asarray(own(**arguments, generator=generator).images[0])

    return draw


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Of 8-bit pictures."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


@pytest.mark.parametrize(
    "negative", [None, "a small green square on a black background"], ids=["plain", "negative"]
)
@pytest.mark.parametrize("scheduler", THEIRS)
def test_the_picture_is_diffusers_own(
    models: Path, theirs: Callable[..., np.ndarray], scheduler: str, negative: str | None
) -> None:
    arguments: dict[str, Any] = {
        "prompt": "a large red circle on a white background",
        "negative_prompt": negative,
        "num_inference_steps": STEPS,
        "seed": 7,
    }
    ours = load_pipeline(models, backend="torch", scheduler=scheduler)(**arguments).images[0]
    assert psnr_db(np.asarray(ours), theirs(scheduler, **arguments)) >= PARITY_DB


def test_pictures_show_what_prompts_say(pipeline: Pipeline) -> None:
    wrong = []
    for number, caption in enumerate(JUDGED):
        seen = judge(pipeline(caption.text, num_inference_steps=STEPS, seed=number).images[0])
        wrong += [] if seen.shows(caption) else [f"{caption.text}: {seen}"]
    assert len(wrong) <= len(JUDGED) // 10, wrong


def test_packages_compiled_models_and_zips_give_the_same_bits(models: Path, tmp_path: Path) -> None:
    (packed,) = models.glob("*_original_compiled.zip")
    unpacked = zips.unpack(packed, tmp_path / "unpacked")
    pictures = [
        np.asarray(
            load_pipeline(place, backend="torch")("a small blue square", num_inference_steps=4, seed=3).images[0]
        )
        for place in (models / "original" / "packages", models / "original" / "compiled", unpacked)
    ]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()


def test_image_to_image_follows_the_new_prompt(pipeline: Pipeline) -> None:
    start = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(start).rectangle((12, 12, 52, 52), fill=(220, 40, 40))
    made = pipeline(
        "a large blue square on a white background",
        image=start,
        strength=0.8,
        num_inference_steps=50,
        seed=1,
    ).images[0]
    seen = judge(made)
    assert (seen.color, seen.background, seen.shape) == ("blue", "white", "square")


def test_inpainting_keeps_what_the_mask_does_not_cover(pipeline: Pipeline) -> None:
    start = Image.new("RGB", (64, 64), "white")
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((8, 8, 55, 55), fill=255)
    made = pipeline(
        "a large red circle on a white background", image=start, mask_image=mask, num_inference_steps=50, seed=2
    ).images[0]
    seen = judge(made)
    assert (seen.color, seen.background) == ("red", "white")


def test_the_flagged_shape_comes_out_black(models: Path) -> None:
    checked = load_pipeline(models, backend="torch")
    flagged = checked(f"a large red {FLAGGED_SHAPE} on a white background", num_inference_steps=STEPS, seed=1)
    plain = checked("a large red circle on a white background", num_inference_steps=STEPS, seed=1)
    assert flagged.nsfw_content_detected == [True]
    assert not np.asarray(flagged.images[0]).any()
    assert plain.nsfw_content_detected == [False]
    assert np.asarray(plain.images[0]).any()
