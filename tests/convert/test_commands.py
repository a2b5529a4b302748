"""compile, bundle, inspect, publish, download and verify on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import small_bundle
from diffusion_convert.checkpoint import open_checkpoint
from diffusion_convert.commands import bundling, inspecting, sharing, verifying
from diffusion_convert.components import Shape, table
from diffusion_convert.export import Recipe, export
from diffusion_convert.options import AttentionKind
from diffusion_runtime import integrity, manifest
from diffusion_runtime.errors import DiffusionError, InputError, PackageError, VerificationError
from diffusion_runtime.mil.program import Metadata


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    for group in (bundling, inspecting, sharing, verifying):
        group.register(made)
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle.write_bundle(tmp_path_factory.mktemp("commands") / "out")


def run(app: typer.Typer, *arguments: object) -> str:
    """Standard output. A DiffusionError comes out as it is: the program around prints it and exits with 2."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, DiffusionError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_compile_writes_under_the_name_asked_for(app: typer.Typer, bundle: Path, tmp_path: Path) -> None:
    package = bundle / "original" / "packages" / f"{small_bundle.NAME}_unet.mlpackage"
    assert run(app, "compile", package, "-o", tmp_path, "--name", "Unet") == f"{tmp_path / 'Unet.mlmodelc'}\n"
    assert (tmp_path / "Unet.mlmodelc" / "model.mil").is_file()
    for arguments, expected in (
        ((package, package, "--name", "Unet"), "--name is for one package"),
        ((package, "--name", "../Unet"), "expected a plain name"),
        ((package, "--compiler", "gcc"), "expected python or xcrun"),
    ):
        with pytest.raises(InputError, match=expected):
            run(app, "compile", *arguments, "-o", tmp_path)


def test_bundle_compiles_zips_and_describes_an_existing_folder(
    app: typer.Typer, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "out")
    run(app, "bundle", tmp_path / "out", "--zip")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "original",
        "split_einsum_v2",
        "README.md",
        "coreml-tiny-diffusion-v1-4_original_compiled.zip",
        "coreml-tiny-diffusion-v1-4_split_einsum_v2_compiled.zip",
        "coreml-tiny-diffusion-v1-4_split_einsum_compiled.zip",
    }
    (found,) = json.loads(run(app, "inspect", tmp_path / "out" / "original" / "compiled", "--json"))
    assert {model["name"] for model in found["models"]} == {
        "TextEncoder.mlmodelc",
        "Unet.mlmodelc",
        "VAEDecoder.mlmodelc",
        "VAEEncoder.mlmodelc",
    }


def test_publish_says_in_a_dry_run_what_it_would_do(app: typer.Typer, bundle: Path) -> None:
    shown = run(app, "publish", bundle, "--repo-id", "maker/model", "--dry-run")
    assert "original/packages/manifest.json" in shown
    assert "to maker/model (private if new)" in shown


def test_download_refuses_a_name_that_is_none(app: typer.Typer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected OWNER/NAME"):
        run(app, "download", "../evil", "-o", tmp_path)


@pytest.fixture(scope="module")
def converted(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder of a tiny checkpoint as a bundle of packages."""
    folder = tmp_path_factory.mktemp("verify") / "out"
    packages = folder / "original" / "packages"
    packages.mkdir(parents=True)
    component = table()["text_encoder"]
    file = f"{small_bundle.NAME}_text_encoder.mlpackage"
    recipe = Recipe(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13")
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    export(component, checkpoint, recipe, packages / file, Metadata())
    small = manifest.read(small_bundle.write_bundle(folder / "small", ("original",)) / "original" / "packages")
    shutil.move(folder / "small" / "original" / "packages" / "vocab.json", packages)
    shutil.move(folder / "small" / "original" / "packages" / "merges.txt", packages)
    shutil.rmtree(folder / "small")
    described = small.components["text_encoder"].model_copy(
        update={"sha256": integrity.hashes(packages, [file]), "psnr_db": {}}
    )
    manifest.write(small.model_copy(update={"components": {"text_encoder": described}}), packages)
    return folder


def test_verify_measures_packages_and_compiled_models(
    app: typer.Typer, converted: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    run(app, "bundle", converted, "--no-card")
    shown = run(app, "verify", converted, "--against", tiny_checkpoint("sd1")).splitlines()
    assert [line.split(":")[0] for line in shown] == [
        "original/packages text_encoder",
        "original/compiled text_encoder",
    ]
    figures = [line.partition(": ")[2] for line in shown]
    assert figures[0] == figures[1], "the compiled model computes what its package does"
    assert all(line.endswith(f"(at least {table()['text_encoder'].min_psnr_db:.1f} dB): ok") for line in shown)


def test_verify_refuses_changed_weights_and_another_source(
    app: typer.Typer, converted: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is of family sd2"):
        run(app, "verify", converted, "--against", tiny_checkpoint("sd2-base"))
    shutil.copytree(converted, tmp_path / "out")
    packages = tmp_path / "out" / "original" / "packages"
    shutil.rmtree(tmp_path / "out" / "original" / "compiled", ignore_errors=True)
    weights = next(packages.rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    data[128:1128] = bytes(1000)  # inside the first weight, the token embedding
    weights.write_bytes(data)
    with pytest.raises(PackageError, match="has changed"):
        run(app, "verify", tmp_path / "out", "--against", tiny_checkpoint("sd1"))
    described = manifest.read(packages)
    part = described.components["text_encoder"]
    part = part.model_copy(update={"sha256": integrity.hashes(packages, part.files)})
    manifest.write(described.model_copy(update={"components": {"text_encoder": part}}), packages)
    with pytest.raises(VerificationError, match="original/packages text_encoder"):
        run(app, "verify", tmp_path / "out", "--against", tiny_checkpoint("sd1"))
