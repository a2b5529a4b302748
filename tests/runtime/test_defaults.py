"""What is taken where nothing is said is what diffusers' pipeline class for the models takes."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
from PIL import Image

from diffusion_runtime import defaults
from diffusion_runtime.control import Control
from diffusion_runtime.families import FAMILIES
from diffusion_runtime.tasks import Request

PICTURE = Image.new("RGB", (8, 8))
IMAGE: dict[str, Any] = {"image": PICTURE}
MASK: dict[str, Any] = {**IMAGE, "mask": PICTURE}
CONTROL: dict[str, Any] = {"controls": (Control("canny", PICTURE),)}
NAMES = {
    "num_inference_steps": "step_count",
    "guidance_scale": "scale",
    "image_guidance_scale": "image_guidance_scale",
    "strength": "change",
    "noise_level": "noise",
}


def rows(prefix: str, *families: str) -> list[tuple[str, str, dict[str, Any]]]:
    plain = [("Pipeline", {}), ("Img2ImgPipeline", IMAGE), ("InpaintPipeline", MASK)]
    steered = [(f"ControlNet{kind}", {**given, **CONTROL}) for kind, given in plain]
    return [(family, prefix + kind, given) for family in families for kind, given in plain + steered]


@pytest.mark.parametrize(
    ("family", "pipeline", "given"),
    [
        *rows("StableDiffusion", "sd1", "sd2-base", "sd2-v"),
        *rows("StableDiffusionXL", "sdxl"),
        *[("sd3", f"StableDiffusion3{kind}Pipeline", given) for kind, given in (("", {}), ("Img2Img", IMAGE))],
        ("sd3", "StableDiffusion3InpaintPipeline", MASK),
        ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", IMAGE),
        ("sdxl-inpainting", "StableDiffusionXLInpaintPipeline", MASK),
        ("sd1-inpainting", "StableDiffusionInpaintPipeline", MASK),
        ("sd2-inpainting", "StableDiffusionInpaintPipeline", MASK),
        ("sd2-depth", "StableDiffusionDepth2ImgPipeline", IMAGE),
        ("x4-upscaler", "StableDiffusionUpscalePipeline", IMAGE),
        ("sd1-pix2pix", "StableDiffusionInstructPix2PixPipeline", IMAGE),
        ("sdxl-pix2pix", "StableDiffusionXLInstructPix2PixPipeline", IMAGE),
        ("lcm", "LatentConsistencyModelPipeline", {}),
        ("lcm", "LatentConsistencyModelImg2ImgPipeline", IMAGE),
        ("lcm", "StableDiffusionControlNetPipeline", CONTROL),
    ],
)
def test_defaults_are_those_of_diffusers(family: str, pipeline: str, given: dict[str, Any]) -> None:
    known = FAMILIES["sd1" if family == "lcm" else family]
    settled = defaults.settled(Request(("a cat",), **given), known, takes_guidance=family == "lcm")
    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    expected = {name: parameters[name].default for name in NAMES if name in parameters}
    found: dict[str, Any] = {name: getattr(settled, NAMES[name]) for name in expected}
    if settled.controls:
        expected["scale"] = parameters["controlnet_conditioning_scale"].default
        found["scale"] = settled.controls[0].scale
    assert found == expected


def test_what_is_said_counts() -> None:
    given = Request(("a cat",), steps=3, guidance_scale=2.0, image=PICTURE, strength=0.1)
    assert defaults.settled(given, FAMILIES["sd3"], takes_guidance=False) == given
