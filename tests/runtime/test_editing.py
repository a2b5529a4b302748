"""InstructPix2Pix, guided by a prompt and by a picture: the pictures are those of diffusers' own classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compvis_layout
from diffusion_convert import ConvertOptions, convert
from diffusion_runtime import InputError, load_pipeline
from diffusion_runtime.cli import app
from pictures import picture

pytestmark = pytest.mark.slow

PARITY_DB = 40.0
Load = Callable[[str], Any]
Psnr = Callable[[Any, Any], float]
ASKED: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 6}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def worst_db(psnr_db: Psnr, ours: Any, theirs: Any, **given: Any) -> float:
    """Of our pictures and diffusers' for the same request; ours without the safety checker, which theirs lacks."""
    expected = theirs(**ASKED | given, generator=seeded()).images
    made = ours(**ASKED | given, generator=seeded()).images
    assert len(made) == len(expected)
    return min(psnr_db(np.asarray(a), np.asarray(b)) for a, b in zip(made, expected, strict=True))


def unchecked(pipe: Any) -> Any:
    import diffusers

    return diffusers.StableDiffusionInstructPix2PixPipeline(
        **{**pipe.components, "safety_checker": None}, requires_safety_checker=False
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize(
    "given",
    [
        {"guidance_scale": 7.5, "image_guidance_scale": 1.5},
        {"prompt": ["a cat", "a dog"], "negative_prompt": ["red", "blue"], "image_guidance_scale": 2.2},
        {"guidance_scale": 1.0},
        {"image_guidance_scale": 0.9},
    ],
    ids=["guided", "two", "unguided", "image below one"],
)
def test_the_picture_is_diffusers_whatever_the_batch(
    reference: Load, psnr_db: Psnr, batch_size: int, given: dict[str, Any]
) -> None:
    own = reference("sd1-pix2pix")
    ours, theirs = own.pipeline(batch_size, "euler-ancestral", check_safety=False), unchecked(own.diffusers)
    theirs.scheduler, given = ours.scheduler, {**given, "image": picture()}
    theirs.set_progress_bar_config(disable=True)
    assert worst_db(psnr_db, ours, theirs, **given) >= PARITY_DB


@pytest.mark.parametrize(
    ("family", "given", "kind"),
    [
        ("sd1-pix2pix", {"image": picture(64), "guidance_scale": 5.0, "image_guidance_scale": 1.2}, "packages"),
        ("sdxl-pix2pix", {"image": picture(128), "negative_prompt": "blue"}, "compiled"),
        (
            "sdxl-pix2pix",
            {"image": picture(128), "original_size": (96, 80), "crops_coords_top_left": (8, 0)},
            "packages",
        ),
    ],
    ids=["sd1", "sdxl", "sdxl sizes"],
)
def test_converted_models_draw_diffusers_picture(
    reference: Load, converted: Callable[..., Path], psnr_db: Psnr, family: str, given: dict[str, Any], kind: str
) -> None:
    pipe = reference(family).diffusers
    theirs = unchecked(pipe) if family.startswith("sd1") else pipe
    theirs.set_progress_bar_config(disable=True)
    models = converted(family, compiled=family.startswith("sdxl")) / "original" / kind
    ours = load_pipeline(models, "torch", check_safety=False)
    assert ours.batch_size == 3
    # diffusers takes the size of SDXL's pictures from the UNet unless it is told.
    theirs_size = {"height": 128, "width": 128} if family.startswith("sdxl") else {}
    assert worst_db(psnr_db, ours, theirs, **given, **theirs_size) >= PARITY_DB


def test_six_bits_draw_diffusers_picture(
    reference: Load, tiny_checkpoint: Callable[[str], Path], psnr_db: Psnr, tmp_path: Path
) -> None:
    theirs = unchecked(reference("sd1-pix2pix").diffusers)
    theirs.set_progress_bar_config(disable=True)
    parts = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
    options = ConvertOptions("original", nbits=6, components=parts, zip=False)
    convert(tiny_checkpoint("sd1-pix2pix"), tmp_path / "models", options)
    ours = load_pipeline(tmp_path / "models" / "original" / "compiled", "torch")
    given = {"image": picture(64), "guidance_scale": 5.0, "image_guidance_scale": 1.2}
    assert worst_db(psnr_db, ours, theirs, **given) >= PARITY_DB


@pytest.mark.parametrize("change", ["single file", "another scale", "CosXL edit"])
def test_what_the_unet_sees_is_scaled_as_in_diffusers(
    tiny_checkpoint: Callable[[str], Path], psnr_db: Psnr, tmp_path: Path, change: str
) -> None:
    """Not at all, though another scale is folded into the encoder; CosXL's alone by the VAE's own."""
    import diffusers

    family = "sdxl-pix2pix" if change == "CosXL edit" else "sd1-pix2pix"
    folder = source = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint"))
    if change == "another scale":
        _edit(folder / "vae" / "config.json", scaling_factor=0.5)
    if change == "CosXL edit":
        _edit(folder / "model_index.json", is_cosxl_edit=True)
    if change == "single file":
        source = compvis_layout.write(folder, tmp_path / "pix2pix.safetensors")
    # A file does not tell for which size it is.
    size = 64 if change == "single file" else None
    options = ConvertOptions("original", verify=False, compiled=False, zip=False, height=size, width=size)
    made = convert(source, tmp_path / "models", options)
    assert made.family == family
    theirs = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True).to(torch.float32)
    theirs = theirs if family.startswith("sdxl") else unchecked(theirs)
    theirs.set_progress_bar_config(disable=True)
    ours = load_pipeline(tmp_path / "models", "torch", check_safety=False)
    assert worst_db(psnr_db, ours, theirs, image=picture(ours.size[0])) >= PARITY_DB


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_command_takes_the_scale_and_the_record_repeats_it(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    picture(64).save(tmp_path / "photo.png")
    command = ["generate", str(converted("sd1-pix2pix", compiled=True)), "--prompt", "a cat", "--seed", "1"]
    command += ["--image", str(tmp_path / "photo.png"), "--image-guidance-scale", "1.2", "--steps", "2"]
    command += ["--backend", "torch", "--no-safety"]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    app([*command, "-o", str(first)], standalone_mode=False)
    app(["generate", "--from", str(first), "-o", str(again), "--backend", "torch"], standalone_mode=False)
    assert first.read_bytes()[:200] and _pixels(first) == _pixels(again)


def _pixels(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("sd1", {"image_guidance_scale": 1.5}, "given an image guidance scale, but these models do text to image"),
        ("sd1-pix2pix", {}, "given a prompt alone, but these models do editing: --image"),
        ("sd1-pix2pix", {"image": picture(), "strength": 0.5}, "given an image and a strength, but"),
        ("sd1-pix2pix", {"image": picture(), "image_guidance_scale": "x"}, "image guidance scale 'x': expected a"),
    ],
)
def test_what_cannot_be_done_is_said(reference: Load, family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reference(family).pipeline()("a cat", **given)


def test_three_rows_are_for_models_that_a_picture_guides(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--batch-size 3: guidance takes 2 rows of sd1"):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", ConvertOptions("original", batch_size=3))
