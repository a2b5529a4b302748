"""IP-Adapters: converted with every attention, and pictures as diffusers draws them with `load_ip_adapter`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny_adapters
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.cli.main import app
from diffusion_runtime import DiffusionError, InputError, Pipeline, load_pipeline, picture_prompts
from diffusion_runtime.bundle import manifest

pytestmark = pytest.mark.slow

PARITY_DB, COMPONENT_DB = 40.0, 60.0
KINDS = ("original", "split_einsum", "split_einsum_v2")
NAMES = ("ip-adapter_sd15.safetensors", "ip-adapter-plus_sd15.bin", "ip-adapter-full-face_sd15.safetensors")
PARTS = ("text_encoder", "unet", "vae_decoder", "image_encoder", "image_projection")
ASKED: dict[str, Any] = {"prompt": "a photo of a cat", "negative_prompt": "red", "num_inference_steps": 4}
Psnr = Callable[[Any, Any], float]


def picture(seed: int) -> Image.Image:
    """Blocks of colour, and no square, so that the centre is cut out."""
    blocks = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    return Image.fromarray(blocks).resize((60, 50), Image.Resampling.NEAREST)


PICTURES = [picture(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of every kind for sd1, and sdxl's plus, with their image encoder beside them."""
    folder = tmp_path_factory.mktemp("adapters") / "models"
    tiny_adapters.write_encoder(folder / "image_encoder")
    for seed, (name, kind) in enumerate(zip(NAMES, ("plain", "plus", "full"), strict=True)):
        tiny_adapters.write_ip_adapter(folder / name, tiny_checkpoint("sd1"), kind, seed)
    tiny_adapters.write_ip_adapter(folder / "plus_sdxl.safetensors", tiny_checkpoint("sdxl"), "plus", 3)
    return folder


@pytest.fixture(scope="module")
def sd1(files: Path, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters with every attention; weights have placeholders, as if they were large."""
    from diffusion_convert.export import placeholders

    folder = tmp_path_factory.mktemp("sd1") / "models"
    adapters = [files / name for name in NAMES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placeholders, "MIN_SIZE", 64)
        options = ConvertOptions(KINDS, components=PARTS, ip_adapters=adapters, compiled=False)
        convert(tiny_checkpoint("sd1"), folder, options)
    return folder


@pytest.fixture(scope="module")
def theirs(files: Path, tiny_checkpoint: Callable[[str], Path]) -> Any:
    """diffusers' pipeline with all three; without the checkpoint's feature extractor, whose pictures would be 224
    pixels high as for the published encoders."""
    import diffusers

    apart: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_checkpoint("sd1")), **apart)
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(files), subfolder="", weight_name=list(NAMES))
    return pipe


@pytest.fixture(scope="module")
def ours(sd1: Path) -> Pipeline:
    return load_pipeline(sd1 / "original" / "packages", "torch")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def arrays(made: Any) -> np.ndarray:
    return np.asarray(made.images[0])


def test_every_component_is_at_parity_with_every_attention(sd1: Path) -> None:
    for kind in KINDS:
        made = manifest.read(sd1 / kind / "packages")
        assert set(made.components) == set(PARTS)
        worst = {name: min(one.psnr_db.values()) for name, one in made.components.items()}
        assert min(worst.values()) >= COMPONENT_DB, worst
        assert [one.name for one in made.ip_adapters] == [Path(name).stem for name in NAMES]
        inputs = {one.name: one.shape for one in made.components["unet"].inputs}
        assert {name: shape for name, shape in inputs.items() if "image" in name or "scale" in name} == {
            "image_tokens_0": (2, 32, 1, 4),
            "image_tokens_1": (2, 32, 1, tiny_adapters.TOKENS),
            "image_tokens_2": (2, 32, 1, 17),
            "ip_adapter_scale": (3,),
        }


@pytest.mark.parametrize("scales", [(0.7, 0.0, 0.0), (0.0, 0.8, 0.0), (0.0, 0.0, 1.0), (0.6, 0.4, 0.0)])
def test_pictures_are_diffusers(scales: tuple[float, ...], ours: Pipeline, theirs: Any, psnr_db: Psnr) -> None:
    """One adapter of each kind, and two at once: a scale of 0 is no adapter."""
    theirs.set_ip_adapter_scale(list(scales))
    expected = arrays(theirs(**ASKED, ip_adapter_image=PICTURES, generator=seeded()))
    given = [one if scale else None for one, scale in zip(PICTURES, scales, strict=True)]
    made = arrays(ours(**ASKED, ip_adapter_image=given, ip_adapter_scale=list(scales), generator=seeded()))
    assert psnr_db(made, expected) >= PARITY_DB
    without = arrays(ours(**ASKED, generator=seeded()))
    assert psnr_db(without, expected) < 30  # the pictures count


def test_without_guidance_and_with_diffusers_embeds(ours: Pipeline, theirs: Any, psnr_db: Psnr) -> None:
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 3, "guidance_scale": 1.0}
    theirs.set_ip_adapter_scale([0.5, 0.5, 0.5])
    expected = arrays(theirs(**asked, ip_adapter_image=PICTURES, generator=seeded()))
    embeds = theirs.prepare_ip_adapter_image_embeds(PICTURES, None, "cpu", 1, False)
    ways: list[dict[str, Any]] = [{"ip_adapter_image": PICTURES}, {"ip_adapter_image_embeds": embeds}]
    for given in ways:
        made = arrays(ours(**asked, **given, ip_adapter_scale=0.5, generator=seeded()))
        assert psnr_db(made, expected) >= PARITY_DB
    guided = theirs.prepare_ip_adapter_image_embeds(PICTURES, None, "cpu", 1, True)
    with pytest.raises(InputError, match=r"expected \(1, 1, …\)"):
        ours(**asked, ip_adapter_image_embeds=guided)
    made = arrays(ours(**ASKED, ip_adapter_image_embeds=guided, ip_adapter_scale=0.5, generator=seeded()))
    expected = arrays(theirs(**ASKED, ip_adapter_image_embeds=guided, generator=seeded()))
    assert psnr_db(made, expected) >= PARITY_DB


def test_several_pictures_for_one_adapter(
    files: Path, theirs: Any, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, psnr_db: Psnr
) -> None:
    """As diffusers takes them, in a list; one alone fills the places of two."""
    options = ConvertOptions(
        "original", components=PARTS, ip_adapters=files / NAMES[1], ip_adapter_pictures=2, compiled=False
    )
    convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    ours = load_pipeline(tmp_path / "models", "torch")
    theirs.set_ip_adapter_scale([0.0, 0.8, 0.0])
    two, embeds = PICTURES[1:], None
    for given in (two, two[:1]):
        asked = [PICTURES[0], given, PICTURES[0]]
        expected = arrays(theirs(**ASKED, ip_adapter_image=asked, generator=seeded()))
        made = arrays(ours(**ASKED, ip_adapter_image=[given], ip_adapter_scale=0.8, generator=seeded()))
        assert psnr_db(made, expected) >= PARITY_DB
        embeds = embeds or (theirs.prepare_ip_adapter_image_embeds(asked, None, "cpu", 1, True), made)
    (_, encoded, _), first = embeds  # type: ignore[misc]
    again = arrays(ours(**ASKED, ip_adapter_image_embeds=[encoded], ip_adapter_scale=0.8, generator=seeded()))
    assert psnr_db(again, first) >= PARITY_DB
    assert psnr_db(made, first) < PARITY_DB  # the second picture counts
    prompts = [picture_prompts.PicturePrompt(one) for one in two]  # as the command line gives them

    assert picture_prompts.placed(ours.manifest, prompts)[0].count == 2
    with pytest.raises(InputError, match="3 pictures, but these models take 2 of each"):
        ours("a cat", ip_adapter_image=[PICTURES])


def test_sdxl_at_6_bits_compiled(
    files: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, psnr_db: Psnr
) -> None:
    import diffusers

    source = tiny_checkpoint("sdxl")
    options = ConvertOptions(nbits=6, ip_adapters=files / "plus_sdxl.safetensors", verify=False)
    convert(source, tmp_path / "models", options)
    made = manifest.read(tmp_path / "models" / "original" / "compiled")
    assert {name for name, one in made.components.items() if one.palettization} == {
        "text_encoder",
        "text_encoder_2",
        "unet",
        "image_encoder",
    }
    (zipped,) = (tmp_path / "models").glob("*.zip")
    names = {name.split("/")[1] for name in zipfile.ZipFile(zipped).namelist()}
    assert {"ImageEncoder.mlmodelc", "ImageProjection.mlmodelc"} <= names
    card = (tmp_path / "models" / "README.md").read_text(encoding="utf-8")
    assert "the IP-Adapter `plus_sdxl`" in card and "--ip-adapter-image plus_sdxl=" in card
    assert "| Mochi Diffusion | no" in card or "has no inputs for what its UNet takes" in card
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(str(source)).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(files), subfolder="", weight_name="plus_sdxl.safetensors")
    pipe.set_ip_adapter_scale(0.6)
    asked: dict[str, Any] = {
        "prompt": "a photo of a cat",
        "num_inference_steps": 8,
        "ip_adapter_image": PICTURES[0],
    }
    expected = arrays(pipe(**asked, generator=seeded()))
    ours = load_pipeline(tmp_path / "models" / "original" / "compiled", "torch")
    assert psnr_db(arrays(ours(**asked, ip_adapter_scale=0.6, generator=seeded())), expected) >= PARITY_DB


def test_verify_and_a_second_run_know_them(sd1: Path, files: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    source, adapters = str(tiny_checkpoint("sd1")), [str(files / name) for name in NAMES]
    again = convert(source, sd1, ConvertOptions(KINDS, components=PARTS, ip_adapters=adapters, compiled=False))
    assert again.unchanged
    run = CliRunner().invoke
    told = run(app, ["verify", str(sd1 / "original"), "--against", source, "--ip-adapter", ",".join(adapters)])
    assert told.exit_code == 0, told.output
    assert " image_projection " in told.output
    assert json.loads(run(app, ["inspect", str(sd1 / "original"), "--json"]).stdout)[0]["manifest"]["ip_adapters"]


def test_generate_and_its_record(sd1: Path, tmp_path: Path, psnr_db: Psnr) -> None:
    first, second, made, again = (tmp_path / f"{name}.png" for name in ("first", "second", "made", "again"))
    PICTURES[0].save(first)
    PICTURES[1].save(second)
    models, run = str(sd1 / "original" / "packages"), CliRunner().invoke
    asked = ["generate", models, "--prompt", "a cat", "--steps", "2", "--seed", "1", "-o"]
    given = ["--ip-adapter-image", f"plus={second}:0.5", "--ip-adapter-image", str(first)]
    told = run(app, [*asked, str(made), *given])
    assert told.exit_code == 0, told.output
    pictures = json.loads(Image.open(made).text["coreml-sd"])["ip_adapter_images"]  # type: ignore[attr-defined]
    assert [(one["name"], one["image"], one["scale"]) for one in pictures] == [
        ("plus", "second.png", 0.5),
        ("", "first.png", None),
    ]
    told = run(app, ["generate", models, "--from", str(made), "-o", str(again)])
    assert told.exit_code == 0, told.output
    assert psnr_db(np.asarray(Image.open(again)), np.asarray(Image.open(made))) == float("inf")
    wrong = run(app, [*asked, str(again), "--ip-adapter-image", f"nobody={first}"])
    assert isinstance(wrong.exception, InputError) and "none is called so" in str(wrong.exception)


def refused(files: Path, checkpoint: Path, **options: Any) -> str:
    with pytest.raises(DiffusionError) as error:
        open_checkpoint(str(checkpoint), ConvertOptions(ip_adapters=[str(files)], **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused(
    files: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, ours: Pipeline
) -> None:
    sd1, plain = tiny_checkpoint("sd1"), files / NAMES[0]
    said = refused(files / "plus_sdxl.safetensors", sd1)
    assert "states of 72 channels, but that of sd1 (sd1) has" in said
    assert "no such file" in refused(tmp_path / "nowhere.bin", sd1)
    assert "is a folder" in refused(files, sd1)
    assert "is no IP-Adapter" in refused(sd1 / "unet" / "diffusion_pytorch_model.safetensors", sd1)
    assert "--image-encoder" in refused(plain, sd1, image_encoder=str(tmp_path))
    tensors = load_file(plain)
    face = {name: value for name, value in tensors.items() if "proj." not in name or "image_proj" not in name}
    face |= {
        "image_proj.norm.weight": tensors["image_proj.norm.weight"],
        "image_proj.proj.0.weight": torch.ones(4, 4),
    }
    save_file(face, tmp_path / "faceid.safetensors")
    assert "FaceID" in refused(tmp_path / "faceid.safetensors", sd1, image_encoder=str(files / "image_encoder"))
    tensors["image_proj.proj.weight"] = torch.ones(128, 9)
    save_file(tensors, tmp_path / "other.safetensors")
    said = refused(tmp_path / "other.safetensors", sd1, image_encoder=str(files / "image_encoder"))
    assert "projection_dim 9, but this one's is 24" in said
    with pytest.raises(InputError, match="--image-encoder: does nothing without --ip-adapter"):
        ConvertOptions(image_encoder=str(files))
    with pytest.raises(InputError, match="comfyui and --ip-adapter"):
        convert(sd1, tmp_path / "out", ConvertOptions(layout="comfyui", ip_adapters=plain))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ip_adapter_image": [*PICTURES, PICTURES[0]]}, "4 pictures for IP-Adapters"),
        ({"ip_adapter_image": [PICTURES]}, "3 pictures, but these models take 1 of each: .*ip-adapter-pictures 3"),
        ({"ip_adapter_image": PICTURES, "ip_adapter_scale": [1.0]}, "1 IP-Adapter scales for 3 pictures"),
        ({"ip_adapter_image": PICTURES, "ip_adapter_scale": {"up": 1.0}}, "by block"),
        ({"ip_adapter_image": PICTURES, "ip_adapter_scale": float("nan")}, "expected a number"),
        ({"ip_adapter_scale": 0.5}, "there is no ip_adapter_image"),
        ({"cross_attention_kwargs": {"ip_adapter_masks": []}}, "this pipeline does not"),
    ]
    for given, why in cases:
        with pytest.raises(InputError, match=why):
            ours("a cat", **given)
