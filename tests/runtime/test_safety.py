"""The safety checker: what it sees, and what becomes of a flagged picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_runtime.backends import TensorSpec
from diffusion_runtime.models import Models
from diffusion_runtime.noise import from_seeds
from diffusion_runtime.pipeline import Pipeline
from diffusion_runtime.safety import clip_input
from diffusion_runtime.tasks import Request


@dataclass(frozen=True)
class Checker:
    """Flags pictures in the order of ``verdicts``, and keeps what it was shown."""

    verdicts: tuple[bool, ...]
    size: int
    seen: list[dict[str, np.ndarray]] = field(default_factory=list)
    sizes: tuple[int, ...] = ()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        shapes = {"clip_input": (1, 3, 224, 224), "images": (1, self.size, self.size, 3), "adjustment": (1,)}
        several = {"images": tuple((1, size, size, 3) for size in self.sizes)}
        return {name: TensorSpec(name, shape, "float16", several.get(name, ())) for name, shape in shapes.items()}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return {"has_nsfw_concepts": TensorSpec("has_nsfw_concepts", (1, 1, 1, 1), "float32")}

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        self.seen.append({name: value.copy() for name, value in arrays.items()})
        verdict = self.verdicts[len(self.seen) - 1]
        return {
            "filtered_images": arrays["images"],
            "has_nsfw_concepts": np.full((1, 1, 1, 1), float(verdict), np.float32),
        }


def checked(whole: Pipeline, checker: Checker, check_safety: bool = True) -> Pipeline:
    models = Models({**whole.models.loads, "safety_checker": partial(lambda model: model, checker)})
    return Pipeline(whole.manifest, models, whole.tokenizer, check_safety=check_safety)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (300, 200), (225, 500)])
def test_the_checker_sees_what_clips_image_processor_makes(width: int, height: int) -> None:
    from transformers import CLIPImageProcessorPil

    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    expected = CLIPImageProcessorPil()(picture, return_tensors="np")["pixel_values"]
    assert np.abs(clip_input(picture) - expected).max() < 1e-4


def test_flagged_pictures_are_wholly_black_and_reported(reference: Callable[[str], Any]) -> None:
    whole = reference("sd1").pipeline()
    result = checked(whole, Checker((False, True), 64))(
        "a cat", num_images_per_prompt=2, num_inference_steps=2, seed=1
    )
    plain = checked(whole, Checker((), 64), check_safety=False)(
        "a cat", num_images_per_prompt=2, num_inference_steps=2, seed=1
    )
    assert result.nsfw_content_detected == [False, True]
    assert np.asarray(result.images[1]).max() == 0
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(plain.images[0]))
    assert plain.nsfw_content_detected is None and np.asarray(plain.images[1]).max() > 0


@pytest.mark.parametrize("check_safety", [True, False])
def test_previews_are_checked_as_pictures_are(reference: Callable[[str], Any], check_safety: bool) -> None:
    pipeline = checked(reference("sd1").pipeline(), Checker((True,), 64), check_safety)
    run = pipeline.prepare(Request(("a cat",), steps=2), from_seeds([1]))
    shown = pipeline.preview(next(pipeline.denoise(run)))
    assert (np.asarray(shown).max() == 0) == check_safety


@pytest.mark.parametrize(("size", "sizes", "is_shown"), [(64, (), True), (512, (), False), (512, (512, 64), True)])
def test_a_checker_of_another_size_still_judges(
    reference: Callable[[str], Any], size: int, sizes: tuple[int, ...], is_shown: bool
) -> None:
    checker = Checker((True,), size, sizes=sizes)
    result = checked(reference("sd1").pipeline(), checker)("a cat", num_inference_steps=2, seed=1)
    assert result.nsfw_content_detected == [True]
    assert (checker.seen[0]["images"].max() > 0) == is_shown
    assert checker.seen[0]["adjustment"].tolist() == [0]


def test_the_verdict_is_diffusers(reference: Callable[[str], Any]) -> None:
    import torch

    found = reference("sd1")
    pipe, pipeline = found.diffusers, found.pipeline()
    flags: list[bool] = []
    ours: list[bool] = []
    for seed in range(4):
        asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5}
        theirs = pipe("a cat", generator=torch.Generator().manual_seed(seed), **asked)
        flags += theirs.nsfw_content_detected
        ours += pipeline("a cat", seed=seed, **asked).nsfw_content_detected or []
    assert ours == flags
