"""The Swift program draws Python's pictures: at least 60 dB. `make test` draws some, `make swift` all of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_convert import ConvertOptions, convert
from diffusion_runtime import images, load_pipeline
from diffusion_runtime.families import AttentionKind
from swift.conftest import Swift

PROMPT = "a large (red:1.3) circle, on a white background"
LONG_PROMPT = "a large red circle, a small (blue:1.2) square, " * 12
MIN_PSNR_DB = 60.0
SCHEDULERS = ("pndm", "euler-ancestral", "dpm++ 2m karras", "heun")
ALL = os.environ.get("SWIFT_PICTURES") == "all"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A checkpoint, options of its conversion, and what `generate` is given. ``few``: it is among those of
    `make test`, with one of the schedulers."""

    checkpoint: str
    given: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    few: bool = False

    def __str__(self) -> str:
        return "-".join([self.checkpoint, *map(str, self.options), *self.given])

    def conversion(self, checkpoint: Callable[[str], Path]) -> ConvertOptions:
        options = {**self.options}
        if "refiner" in options:
            options["refiner"] = checkpoint(options["refiner"])
        return ConvertOptions(attention=(AttentionKind.ORIGINAL,), zip=False, **options)


STRONG: Mapping[str, Any] = {"image": "picture.png", "strength": 0.6}
MASKED: Mapping[str, Any] = {"image": "picture.png", "mask": "mask.png"}
BASE_AND_REFINER: Mapping[str, Any] = {"refiner": "sdxl-refiner", "chunk_unet": True}
CASES = (
    Case("shapes", few=True),
    Case("shapes", STRONG, few=True),
    Case("shapes", MASKED),
    Case("shapes", {**MASKED, "strength": 0.7}, few=True),
    Case("sd1", options={"context_length": 154}, given={"prompt": LONG_PROMPT}),
    Case("sd1", options={"chunk_unet": True}),
    Case("sd1-inpainting", MASKED, few=True),
    Case("sd1-inpainting", {**MASKED, "strength": 0.7, "negative_prompt": "blue"}),
    Case("sd1-lcm", few=True),
    Case("sd1-small"),
    Case("sd2-base", options={"batch_size": 1}),
    Case("sd2-v", options={"batch_size": 1}, few=True),
    Case("sd2-inpainting", MASKED),
    Case("sd2-depth", {"image": "picture.png"}, few=True),
    Case("sd2-depth", {"image": "picture.png", "depth_image": "depth.png", "strength": 1.0}),
    Case("x4-upscaler", {"image": "picture.png", "noise_level": 40}, few=True),
    Case("sdxl", few=True),
    Case("sdxl", options={"batch_size": 1}, given={"negative_prompt": ""}),
    Case("sdxl", STRONG),
    Case("sdxl-v-zero-snr"),
    Case("sdxl-inpainting", MASKED),
    Case("sdxl-refiner", {"image": "picture.png"}),
    Case("sdxl", {"refiner_start": 0.2}, BASE_AND_REFINER, few=True),
    Case("sdxl", {"refiner_start": 0.8, **STRONG}, {**BASE_AND_REFINER, "batch_size": 1}),
    Case("sdxl-lcm", {"guidance_scale": 6.0}),
)


def _drawings() -> list[Any]:
    """Every case with every scheduler; of `make test` some, with schedulers and kinds in turn."""
    listed = []
    for number, case in enumerate(CASES):
        able = ("lcm",) * 2 if "lcm" in case.checkpoint else SCHEDULERS
        for index, scheduler in enumerate(able if ALL else (able[number % len(able)],)):
            kind = "compiled" if (number + index) % 2 else "packages"
            if ALL or case.few:
                listed.append(pytest.param(case, kind, scheduler, id=f"{case}-{kind}-{scheduler}"))
    return listed


@pytest.fixture(scope="session")
def models(
    build_once: Callable[..., Path], converted: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> Callable[[Case], Path]:
    """The converted models of a case."""

    def of_case(case: Case) -> Path:
        def write(folder: Path) -> None:
            convert(tiny_checkpoint(case.checkpoint), folder / "models", case.conversion(tiny_checkpoint))

        if not case.options:
            return converted(case.checkpoint, compiled=True) / "original"
        name = "-".join(["swift", case.checkpoint, *(f"{key}{value}" for key, value in case.options.items())])
        return build_once(name, write) / "models" / "original"

    return of_case


@pytest.fixture(scope="session")
def pictures(build_once: Callable[..., Path]) -> Path:
    """A picture of another size than any models', a mask and a depth of 16 bits."""

    def write(folder: Path) -> None:
        coarse = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((150, 90), Image.Resampling.BICUBIC).save(folder / "picture.png")
        mask = np.zeros((90, 150), np.uint8)
        mask[20:70, 60:] = 255
        Image.fromarray(mask).save(folder / "mask.png")
        depth = np.linspace(0, 65535, 90 * 150).reshape(90, 150).astype(np.uint16)
        Image.fromarray(depth).save(folder / "depth.png")

    return build_once("swift-pictures", write)


@pytest.mark.parametrize(("case", "kind", "scheduler"), _drawings())
@pytest.mark.filterwarnings("ignore::diffusion_runtime.RuntimeNote")
def test_pictures_are_pythons(
    case: Case,
    kind: str,
    scheduler: str,
    models: Callable[[Case], Path],
    pictures: Path,
    swift_program: Swift,
    tmp_path: Path,
) -> None:
    folder, output = models(case) / kind, tmp_path / "swift.png"
    given: dict[str, Any] = {"prompt": PROMPT, **case.given}
    named = [name for name in ("image", "mask", "depth_image") if name in given]
    files: dict[str, Path] = {name: pictures / given.pop(name) for name in named}
    chosen: dict[str, Any] = {"seed": 5, "steps": 6, "scheduler": scheduler, **given, **files}
    options = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = swift_program("generate", str(folder), *options, "-o", str(output))
    assert done.returncode == 0, done.stderr
    modes = {"image": ("image", "RGB"), "mask": ("mask_image", "L"), "depth_image": ("depth_map", "F")}
    loaded = {modes[name][0]: images.load(path, name, modes[name][1]) for name, path in files.items()}
    pipe: Any = load_pipeline(folder, backend="torch", scheduler=scheduler)
    expected = pipe(**given, **loaded, num_inference_steps=6, seed=5).images[0]
    with Image.open(output) as image:
        assert psnr_db(image, expected) >= MIN_PSNR_DB
    assert images.read_metadata(output)["task"] != "text to image" or not files


@pytest.mark.parametrize("kind", ["packages", "compiled"])
@pytest.mark.filterwarnings("ignore::diffusion_runtime.RuntimeNote")
def test_a_refiner_of_apples_tools_is_known(
    kind: str, models: Callable[[Case], Path], swift_program: Swift, tmp_path: Path
) -> None:
    """Without a manifest: the same names alone, as Apple's converter leaves them."""
    case = next(case for case in CASES if case.few and "refiner_start" in case.given)
    folder, output = tmp_path / "models", tmp_path / "swift.png"
    ignored = shutil.ignore_patterns("manifest.json", "tokenizer_2")
    shutil.copytree(models(case) / kind, folder, ignore=ignored)
    options = ("--steps", "4", "--seed", "5", "--refiner-start", "0.5", "--reduce-memory")
    done = swift_program("generate", str(folder), "--prompt", PROMPT, *options, "-o", str(output))
    assert done.returncode == 0, done.stderr
    pipe = load_pipeline(folder, backend="torch")
    expected = pipe(PROMPT, num_inference_steps=4, seed=5, refiner_start=0.5).images[0]
    with Image.open(output) as image:
        assert psnr_db(image, expected) >= MIN_PSNR_DB
    assert images.read_metadata(output)["refiner_start"] == 0.5


def psnr_db(drawn: Image.Image, expected: Image.Image) -> float:
    first, second = (np.asarray(image, np.float64) for image in (drawn, expected))
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
