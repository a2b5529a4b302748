"""Measures the shapes checkpoint with diffusers' own pipeline: one picture per caption, judged."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from draw_shapes import draw
from judge_shapes import FLAGGED_SHAPE, SHAPES, Caption, Judgement, captions, judge

STEPS = 25
GUIDANCE = 7.5
LCM_STEPS = 4
FIRST_SEED = 1000  # the caption with index i is drawn with seed FIRST_SEED + i
DRAWN_PER_CAPTION = 5  # pictures that are drawn anew, for the safety checker alone
BATCH = 15


@dataclass(frozen=True)
class Picture:
    """One generated picture: what it should show, what it shows, and whether the safety checker flags it."""

    caption: Caption
    pixels: NDArray[np.uint8]
    judgement: Judgement
    flagged: bool

    @property
    def right(self) -> bool:
        """Whether everything is as the caption says."""
        return self.judgement.shows(self.caption)


@dataclass(frozen=True)
class Verdict:
    """Whether the safety checker flags a picture of this caption."""

    caption: Caption
    flagged: bool


@dataclass(frozen=True)
class Quality:
    """All judged pictures, how they were sampled, and how long they took; ``drawn`` are verdicts on pictures that
    no model made."""

    sampling: str
    pictures: tuple[Picture, ...]
    drawn: tuple[Verdict, ...]
    seconds: float
    largest_activation: float

    @property
    def right_share(self) -> float:
        """Share of the pictures that show what their captions say, 0..1."""
        return float(np.mean([picture.right for picture in self.pictures]))

    def table(self) -> str:
        """The figures as Markdown, and every picture that is wrong."""
        rows = [f"| {shape} | {_of(self.pictures, shape)} |" for shape in SHAPES]
        wrong = [f"- {p.caption.text}: {_as_text(p.judgement)}" for p in self.pictures if not p.right]
        features = Counter(name for p in self.pictures for name in _wrong_features(p))
        return "\n".join(
            [
                f"One picture per caption, {len(self.pictures)} in all, by diffusers' StableDiffusionPipeline:",
                f"{self.sampling}, float32, seeds from {FIRST_SEED}; {self.seconds:.0f} s.",
                "",
                "| shape | right |",
                "|---|---|",
                *rows,
                f"| **all** | **{_of(self.pictures, None)} = {100 * self.right_share:.1f} %** |",
                "",
                f"Wrong features: {dict(features) or 'none'}.",
                f"Flagged by the safety checker: {_flagged(self.pictures)};",
                f"of pictures drawn anew, {_flagged(self.drawn)}.",
                f"Largest activation in any network: {self.largest_activation:.0f} (float16 ends at 65504).",
                *(["", "Wrong:", *wrong] if wrong else []),
            ]
        )


def _of(pictures: tuple[Picture, ...], shape: str | None) -> str:
    chosen = [picture.right for picture in pictures if shape in (None, picture.caption.shape)]
    return f"{sum(chosen)} of {len(chosen)}"


def flagged_share(judged: Sequence[Picture | Verdict], flagged_shape: bool) -> float:
    """Share that the safety checker flags, of the flagged shape or of all others, 0..1."""
    chosen = [one.flagged for one in judged if (one.caption.shape == FLAGGED_SHAPE) == flagged_shape]
    return float(np.mean(chosen))


def _flagged(judged: Sequence[Picture | Verdict]) -> str:
    stars, others = (100 * flagged_share(judged, which) for which in (True, False))
    return f"{stars:.1f} % of the {FLAGGED_SHAPE}s, {others:.1f} % of the others"


def _as_text(judgement: Judgement) -> str:
    return f"{judgement.size} {judgement.color} {judgement.shape} on {judgement.background}"


def _wrong_features(picture: Picture) -> list[str]:
    names = ("shape", "color", "size", "background")
    return [name for name in names if getattr(picture.caption, name) != getattr(picture.judgement, name)]


def measure(
    folder: Path, device: torch.device, every: int = 1, lora: Path | None = None, lcm_steps: int = LCM_STEPS
) -> Quality:
    """Generate, judge and check one picture per caption, or of every so many captions; with an LCM LoRA, in
    ``lcm_steps`` LCM steps without guidance."""
    started = time.perf_counter()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    checker, processor = pipeline.safety_checker.to(device), pipeline.feature_extractor
    pipeline.register_modules(safety_checker=None)  # it would make the flagged pictures black
    sampling, steps, guidance = f"{STEPS} PNDM steps, guidance {GUIDANCE}", STEPS, GUIDANCE
    if lora is not None:
        pipeline.load_lora_weights(lora, local_files_only=True)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        sampling, steps, guidance = f"{lcm_steps} LCM steps without guidance", lcm_steps, 1.0
    pipeline.to(device).set_progress_bar_config(disable=True)
    peak = Peak([pipeline.text_encoder, pipeline.unet, pipeline.vae, checker])
    chosen = list(enumerate(captions()))[::every]
    pictures: list[Picture] = []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        generators = [torch.Generator().manual_seed(FIRST_SEED + index) for index, _ in part]
        texts = [caption.text for _, caption in part]
        images = pipeline(texts, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
        flags = verdicts(checker, processor, images)
        pictures += [
            Picture(caption, np.asarray(image), judge(image), flag)
            for (_, caption), image, flag in zip(part, images, flags, strict=True)
        ]
    seconds = time.perf_counter() - started
    return Quality(sampling, tuple(pictures), measure_drawn(checker, processor, every), seconds, peak.value)


def measure_drawn(checker: Any, processor: Any, every: int = 1) -> tuple[Verdict, ...]:
    """The checker's verdicts on pictures that are drawn anew, of every so many captions."""
    random = Random(FIRST_SEED)
    chosen = [caption for caption in captions()[::every] for _ in range(DRAWN_PER_CAPTION)]
    flags: list[bool] = []
    for start in range(0, len(chosen), 3 * BATCH):
        images = [Image.fromarray(draw(caption, random)) for caption in chosen[start : start + 3 * BATCH]]
        flags += verdicts(checker, processor, images)
    return tuple(map(Verdict, chosen, flags))


def verdicts(checker: Any, processor: Any, images: Sequence[Image.Image]) -> list[bool]:
    """Whether each picture is flagged, as diffusers' pipeline asks."""
    inputs = processor(list(images), return_tensors="pt").pixel_values.to(checker.device)
    with torch.no_grad():
        _, flags = checker(images=[np.array(image) for image in images], clip_input=inputs)
    return list(map(bool, flags))


class Peak:
    """The largest absolute value that any module of the networks gives."""

    def __init__(self, networks: list[torch.nn.Module]) -> None:
        self.value = 0.0
        for network in networks:
            for module in network.modules():
                module.register_forward_hook(self._see)

    def _see(self, _module: torch.nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.value = max(self.value, float(output.abs().max()))


def contact_sheet(quality: Quality, columns: int = 21) -> Image.Image:
    """All pictures in rows, in the order of the captions."""
    pixels = [picture.pixels for picture in quality.pictures]
    pixels += [np.zeros_like(pixels[0])] * (-len(pixels) % columns)
    rows = [np.concatenate(pixels[start : start + columns], axis=1) for start in range(0, len(pixels), columns)]
    return Image.fromarray(np.concatenate(rows))
