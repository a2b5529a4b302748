"""SDXL's base and refiner in one folder of models: what is written, and the picture of both."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import compvis_layout
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.cli.main import app
from diffusion_convert.hub.download import download
from diffusion_convert.hub.publish import publish
from diffusion_runtime import InputError, Pipeline, load_pipeline
from diffusion_runtime.bundle import manifest, views
from hub_server import Hub, serving

pytestmark = pytest.mark.slow

PARITY_DB = 40.0
START = 0.2  # tiny random networks change little: the refiner does most of the steps
ASKED: dict[str, Any] = {"prompt": "a photo of a cat", "negative_prompt": "red", "num_inference_steps": 10}
Psnr = Callable[[Any, Any], float]


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with-refiner") / "models"
    made = convert(
        tiny_checkpoint("sdxl"), folder, ConvertOptions(refiner=tiny_checkpoint("sdxl-refiner"), chunk_unet=True)
    )
    assert any("the refiner has another text_encoder_2" in note for note in made.notes)
    return folder


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def expected(reference: Callable[[str], Any]) -> Any:
    """The picture of diffusers' two pipelines, which share encoder and VAE as their users let them."""
    import diffusers

    first, second = (reference(family).diffusers for family in ("sdxl", "sdxl-refiner"))
    base = diffusers.StableDiffusionXLPipeline(**first.components)
    shared = {"text_encoder_2": first.text_encoder_2, "tokenizer_2": first.tokenizer_2, "vae": first.vae}
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{**second.components, **shared}, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
    )
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    generator = seeded()
    latents = base(**ASKED, denoising_end=START, output_type="latent", generator=generator).images
    return refiner(**ASKED, image=latents, denoising_start=START, generator=generator).images[0]


@pytest.mark.parametrize(("kind", "reduce_memory"), [("packages", False), ("compiled", True)])
def test_the_picture_is_that_of_two_pipelines(
    kind: str, reduce_memory: bool, models: Path, expected: Any, psnr_db: Psnr
) -> None:
    pipeline = load_pipeline(models / "original" / kind, "torch", reduce_memory=reduce_memory)
    steps: list[tuple[int, int]] = []
    made = pipeline(
        **ASKED,
        refiner_start=START,
        generator=seeded(),
        on_step=lambda step: steps.append((step.index, step.total)),
    )
    reached = psnr_db(np.asarray(made.images[0]), np.asarray(expected))
    assert reached >= PARITY_DB
    assert steps == [(index, 10) for index in range(10)]
    alone = pipeline(**ASKED, generator=seeded())
    assert psnr_db(np.asarray(alone.images[0]), np.asarray(expected)) < reached - 10


def test_what_is_written_bears_apples_names(models: Path) -> None:
    made = manifest.read(models / "original" / "packages")
    assert made.components["refiner"].files == tuple(
        f"Stable_Diffusion_version_sdxl_refiner_chunk{number}.mlpackage" for number in (1, 2)
    )
    ports = made.components["refiner"].inputs, made.components["refiner"].outputs
    inputs, outputs = ({one.name: (one.dtype, one.shape) for one in side} for side in ports)
    assert inputs == {
        "sample": ("float16", (2, 4, 16, 16)),
        "timestep": ("float16", (2,)),
        "encoder_hidden_states": ("float16", (2, 40, 1, 77)),
        "time_ids": ("float16", (2, 5)),
        "text_embeds": ("float16", (2, 24)),
    }
    assert outputs == {"noise_pred": ("float32", (2, 4, 16, 16))}
    assert made.refiner is not None
    assert made.refiner.source.name == "sdxl-refiner"
    compiled = {"UnetRefinerChunk1.mlmodelc", "UnetRefinerChunk2.mlmodelc"}
    assert compiled <= {path.name for path in (models / "original" / "compiled").iterdir()}
    (zipped,) = models.glob("*.zip")
    assert compiled <= {name.split("/")[1] for name in zipfile.ZipFile(zipped).namelist() if "/" in name}
    card = (models / "README.md").read_text()
    assert "with `sdxl-refiner` for the last steps" in card
    assert "--refiner-start 0.8" in card


def test_commands_know_the_refiner(models: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    runner = CliRunner()
    base, refiner = (str(tiny_checkpoint(name)) for name in ("sdxl", "sdxl-refiner"))
    verified = runner.invoke(app, ["verify", str(models), "--against", base, "--refiner", refiner])
    assert verified.exit_code == 0, verified.output
    assert sum(" refiner " in line and line.endswith(" ok") for line in verified.output.splitlines()) == 2
    alone = runner.invoke(app, ["verify", str(models), "--against", base])
    assert isinstance(alone.exception, InputError)
    picture = tmp_path / "picture.png"
    drawn = runner.invoke(
        app,
        [
            "generate",
            str(models),
            "--prompt",
            "a cat",
            "--steps",
            "4",
            "--refiner-start",
            "0.5",
            "-o",
            str(picture),
        ],
    )
    assert drawn.exit_code == 0, drawn.output
    again = runner.invoke(app, ["generate", "--from", str(picture), str(models), "-o", str(tmp_path / "again.png")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.png").read_bytes()[-2000:-1000] == picture.read_bytes()[-2000:-1000]
    shown = runner.invoke(app, ["inspect", str(models / "original" / "compiled")])
    assert "UnetRefinerChunk1" in shown.output


def test_a_bundle_of_both_goes_through_every_command(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages as Apple's tools leave them, one with 6 bits, are bundled, zipped, published and downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the server here does not speak it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = tmp_path / "tiny-xl"
    packages = shutil.copytree(
        models / "original" / "packages", folder / "packages", ignore=shutil.ignore_patterns("manifest.json")
    )
    first = packages / "Stable_Diffusion_version_sdxl_refiner_chunk1.mlpackage"
    few = tmp_path / "few.mlpackage"
    assert "weights at 6.00 bits" in said("palettize", first, "-o", few, "--nbits", "6")
    shutil.rmtree(first)
    few.rename(first)
    assert "/Mine.mlmodelc" in said("compile", first, "-o", tmp_path / "compiled", "--name", "Mine")
    said("bundle", folder, "--zip")
    made = manifest.read(folder / "original" / "compiled")
    assert made.components["refiner"].files == ("UnetRefinerChunk1.mlmodelc", "UnetRefinerChunk2.mlmodelc")
    assert made.components["refiner"].palettization is not None
    (zipped,) = folder.glob("*.zip")
    held = {name.split("/")[1] for name in zipfile.ZipFile(zipped).namelist() if "/" in name}
    assert set(made.components["refiner"].files) <= held
    assert "6 bits" in said("inspect", folder / "original" / "compiled")
    assert "original/compiled/UnetRefinerChunk1.mlmodelc/model.mil" in said(
        *("publish", folder, "--repo-id", "maker/xl", "--dry-run", "--unverified")
    )
    with serving(Hub()) as hub:
        publish(folder, "maker/xl", endpoint=hub.endpoint, token="hf_none", unverified=True)  # noqa: S106
        fetched = download("maker/xl", tmp_path / "fetched", endpoint=hub.endpoint)
    asked: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "refiner_start": 0.5, "seed": 1}
    there, here = (load_pipeline(place, "torch")(**asked).images[0] for place in (fetched, folder))
    assert np.array_equal(np.asarray(there), np.asarray(here))
    alone = load_pipeline(fetched, "torch")(**{**asked, "refiner_start": None}).images[0]
    assert not np.array_equal(np.asarray(there), np.asarray(alone))


def said(*arguments: object) -> str:
    """The output of a command that succeeds."""
    done = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "1000"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_folder_of_apples_tools_is_known(models: Path, tmp_path: Path) -> None:
    """Without a manifest: the same names alone, as Apple's converter leaves them."""
    for kind in ("packages", "compiled"):
        folder = tmp_path / kind
        shutil.copytree(
            models / "original" / kind, folder, ignore=shutil.ignore_patterns("manifest.json", "tokenizer_2")
        )
        found = load_pipeline(folder, "torch")
        assert found.manifest.family == "sdxl"
        assert found.refiner is not None
        made = found("a cat", num_inference_steps=2, refiner_start=0.5, seed=1)
        assert made.images[0].size == (128, 128)


def test_a_refiner_in_one_file(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole, or its UNet alone, as what it shares with the base is the base's anyway."""
    from safetensors.torch import load_file, save_file

    base, folder = (tiny_checkpoint(name) for name in ("sdxl", "sdxl-refiner"))
    path = compvis_layout.write(folder, tmp_path / "refiner.safetensors")
    whole = open_checkpoint(str(base), ConvertOptions(refiner=str(path)))
    save_file({name: value for name, value in load_file(path).items() if name.startswith("model.")}, path)
    alone = open_checkpoint(str(base), ConvertOptions(refiner=str(path)))
    theirs = compvis_layout.read_weights(folder, "unet")
    for found in (whole, alone):
        ours = found.models["refiner"].tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_cannot_be_is_said(models: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    sdxl, sd1, refiner = (str(tiny_checkpoint(name)) for name in ("sdxl", "sd1", "sdxl-refiner"))
    for source, second, message in (
        (sdxl, sdxl, "is of family sdxl: expected sdxl-refiner"),
        (sd1, refiner, "is of family sd1: expected sdxl"),
        (sdxl, "nowhere", "--refiner nowhere: no such file"),
    ):
        with pytest.raises(Exception, match=message):
            open_checkpoint(source, ConvertOptions(refiner=second))
    pipeline: Pipeline = load_pipeline(models, "torch")
    failing: tuple[tuple[dict[str, Any], str], ...] = (
        ({"refiner_start": 1.0}, "more than 0 and less than 1"),
        ({"refiner_start": 0.5, "denoising_end": 0.5}, "both given"),
        ({"refiner_start": 0.999, "num_inference_steps": 2}, "use more steps"),
    )
    for given, message in failing:
        with pytest.raises(InputError, match=message):
            pipeline("a cat", **given)


def test_a_manifest_without_the_component_has_no_refiner(models: Path) -> None:
    described = json.loads((models / "original" / "packages" / "manifest.json").read_text())
    del described["components"]["refiner"]
    assert views.of_refiner(manifest.Manifest.model_validate(described)) is None
