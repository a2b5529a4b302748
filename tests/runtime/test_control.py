"""ControlNets, converted, against diffusers' own pipelines with them, and the pictures that they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_runtime import load_pipeline
from pictures import half_mask, picture

pytestmark = pytest.mark.slow

PARITY_DB = 40.0
CHANGED_DB = 35.0  # below it, a picture is another one
Kind = Callable[[str], Path]
Psnr = Callable[[Any, Any], float]
SIDES = {"sd1": 64, "sdxl": 128}
EDGES, SHUFFLE, TILE = "edges_v1-tiny", "shuffle", "tile"


def shown(kind: str, *seeds: int) -> list[Image.Image]:
    return [picture(SIDES[kind], seed) for seed in seeds]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint: Kind, controlnets: Kind) -> Callable[..., Image.Image]:
    """``drawn(kind, class_name, names, **given)``: the picture that diffusers' class makes with those ControlNets,
    loaded as its users load it, in float32."""
    import diffusers

    def draw(kind: str, class_name: str, names: list[str], **given: Any) -> Image.Image:
        nets = [diffusers.ControlNetModel.from_pretrained(controlnets(kind) / name) for name in names]
        checks = {"safety_checker": None} if kind == "sd1" else {}
        pipe = getattr(diffusers, class_name).from_pretrained(
            tiny_checkpoint(kind), controlnet=nets if len(nets) > 1 else nets[0], local_files_only=True, **checks
        )
        pipe.to(torch.float32).set_progress_bar_config(disable=True)
        if "image" not in given:  # what is a control image elsewhere
            given["image"] = given.pop("control_image")
        made: Image.Image = pipe(**given, generator=seeded()).images[0]
        return made

    return draw


def asked(kind: str, names: list[str], **given: Any) -> dict[str, Any]:
    images = shown(kind, *range(1, len(names) + 1))
    told = {"prompt": "a photo of a cat", "negative_prompt": "red", "num_inference_steps": 8}
    return {**told, "control_image": images if len(images) > 1 else images[0], **given}


def start(kind: str, masked: bool = False) -> dict[str, Any]:
    (image,) = shown(kind, 0)
    return {"image": image, **({"mask_image": half_mask(SIDES[kind])} if masked else {})}


def ours(folder: Path, names: list[str], given: dict[str, Any]) -> Image.Image:
    pipeline = load_pipeline(folder, "torch", check_safety=False)
    image: Image.Image = pipeline(**given, controlnet=names, generator=seeded()).images[0]
    return image


CASES: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
    "one": ("sd1", "StableDiffusionControlNetPipeline", [EDGES], {}),
    "of three, each its own scale and interval": (
        "sd1",
        "StableDiffusionControlNetPipeline",
        [EDGES, SHUFFLE, TILE],
        {
            "controlnet_conditioning_scale": [0.5, 1.2, 0.9],
            "control_guidance_start": [0.0, 0.25, 0.5],
            "control_guidance_end": [0.6, 1.0, 0.9],
        },
    ),
    "one that is pooled": ("sd1", "StableDiffusionControlNetPipeline", [SHUFFLE], {}),
    "guess mode": (
        "sd1",
        "StableDiffusionControlNetPipeline",
        [EDGES],
        {"guess_mode": True, "guidance_scale": 4.0},
    ),
    "without guidance": ("sd1", "StableDiffusionControlNetPipeline", [TILE], {"guidance_scale": 1.0}),
    "from a picture": ("sd1", "StableDiffusionControlNetImg2ImgPipeline", [TILE, EDGES], start("sd1")),
    "a part of a picture's steps": (
        "sd1",
        "StableDiffusionControlNetImg2ImgPipeline",
        [TILE],
        {**start("sd1"), "strength": 0.6, "control_guidance_start": 0.2},
    ),
    "in a mask": ("sd1", "StableDiffusionControlNetInpaintPipeline", [EDGES], start("sd1", masked=True)),
    "SDXL": ("sdxl", "StableDiffusionXLControlNetPipeline", ["edges"], {}),
    "SDXL, from a picture": ("sdxl", "StableDiffusionXLControlNetImg2ImgPipeline", ["edges"], start("sdxl")),
    "SDXL, in a mask": ("sdxl", "StableDiffusionXLControlNetInpaintPipeline", ["edges"], start("sdxl", True)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_diffusers(case: str, drawn: Callable[..., Any], steered: Kind, psnr_db: Psnr) -> None:
    kind, class_name, names, given = CASES[case]
    told = asked(kind, names, **given)
    expected = drawn(kind, class_name, names, **told)
    assert psnr_db(np.asarray(ours(steered(kind), names, told)), np.asarray(expected)) >= PARITY_DB
    told["controlnet_conditioning_scale"] = 0.0
    assert psnr_db(np.asarray(ours(steered(kind), names, told)), np.asarray(expected)) < CHANGED_DB
