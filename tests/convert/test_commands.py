"""compile, bundle, inspect, publish, download and verify on the command line."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import small_bundle
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.cli import bundle as bundling
from diffusion_convert.cli import inspect as inspecting
from diffusion_convert.cli import share as sharing
from diffusion_convert.cli import verify as verifying
from diffusion_convert.compile import compile_package
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.option_values import Lora
from diffusion_convert.options import ConvertOptions
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package
from diffusion_convert.verification import compare
from diffusion_runtime.bundle import integrity, manifest
from diffusion_runtime.bundle.find import find
from diffusion_runtime.errors import DiffusionError, InputError, PackageError
from diffusion_runtime.families import AttentionKind, compiled_names
from diffusion_runtime.mil.program import Metadata


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    made.command("compile")(bundling.compile_)
    for one in (bundling.bundle, inspecting.inspect, sharing.publish, sharing.download, verifying.verify):
        made.command()(one)
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
        ((package, "--name", ""), "expected a plain name"),
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


def test_bundle_of_no_folder_makes_none(app: typer.Typer, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.png")
    with pytest.raises(InputError, match="nosuch: no such folder"):
        run(app, "bundle", tmp_path / "nosuch", "--picture", tmp_path / "drawn.png")
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


FOREIGN = "Stable_Diffusion_version_maker_tiny"


@pytest.mark.parametrize("layout", ["flat", "resources", "hub"])
def test_bundle_takes_over_what_other_tools_made(
    app: typer.Typer, bundle: Path, tmp_path: Path, layout: str
) -> None:
    """Apple's packages in one folder, with compiled models in Resources/, or a repository of the Hub."""
    source, out = bundle / "split_einsum_v2" / "packages", tmp_path / "out"
    place = {"flat": out, "resources": out, "hub": out / "split_einsum" / "packages"}[layout]
    for name in small_bundle.PORTS:
        package = place / f"{FOREIGN}_{name}.mlpackage"
        shutil.copytree(source / f"{small_bundle.NAME}_{name}.mlpackage", package)
        if layout == "resources":
            compile_package(package, out / "Resources", compiled_names(name)[0])
    with pytest.raises(InputError, match=r"no vocab\.json and merges\.txt"):
        run(app, "bundle", out)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(source / file, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mlmodelc")}
    for _ in range(2):
        run(app, "bundle", out, "--zip", "--name", "maker/tiny")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    variant = out / "split_einsum"
    compiled = manifest.read(variant / "compiled")
    integrity.check_files(compiled, variant / "compiled")
    assert (compiled.name, compiled.attention, compiled.target) == ("maker/tiny", "split_einsum", "macOS13")
    assert find(out).folder.parent == variant
    (path,) = out.glob("*.zip")
    assert path.name == "coreml-tiny_split_einsum_compiled.zip"
    with zipfile.ZipFile(path) as archive:
        assert {f"{path.stem}/{name}" for name in ("vocab.json", "merges.txt")} < set(archive.namelist())
    assert "by another tool" in (out / "README.md").read_text()
    dry_run = ("publish", out, "--repo-id", "maker/tiny", "--dry-run")
    with pytest.raises(InputError, match="not verified: split_einsum/"):
        run(app, *dry_run)
    assert "split_einsum/compiled/manifest.json" in run(app, *dry_run, "--unverified")


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
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    return write_text_encoder(tmp_path_factory.mktemp("verify") / "out", checkpoint)


def write_text_encoder(folder: Path, checkpoint: Checkpoint) -> Path:
    packages = folder / "original" / "packages"
    packages.mkdir(parents=True)
    component = table()["text_encoder"]
    file = f"{small_bundle.NAME}_text_encoder.mlpackage"
    recipe = ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13")
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
    head, *shown = [
        line.split() for line in run(app, "verify", converted, "--against", tiny_checkpoint("sd1")).splitlines()
    ]
    assert head == ["models", "component", "worst", "output", "PSNR", "at", "least"]
    assert [line[:2] for line in shown] == [
        ["original/packages", "text_encoder"],
        ["original/compiled", "text_encoder"],
    ]
    assert shown[0][2:] == shown[1][2:], "the compiled model computes what its package does"
    bound = f"{table()['text_encoder'].min_psnr_db:.1f}"
    assert all(line[-3:] == [bound, "dB", "ok"] for line in shown)


def test_verify_takes_models_of_other_tools(
    app: typer.Typer, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    recipe = ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13")
    for name in ("text_encoder", "unet", "vae_decoder"):
        path = tmp_path / f"Stable_Diffusion_version_tiny_{name}.mlpackage"
        export(table()[name], checkpoint, recipe, path, Metadata())
    whole, unet = tmp_path / "whole.mlpackage", tmp_path / "Stable_Diffusion_version_tiny_unet.mlpackage"
    unet.rename(whole)
    palettize_package(whole, unet, PalettizeOptions(bits=6))
    shown = [
        line.split() for line in run(app, "verify", tmp_path, "--against", tiny_checkpoint("sd1")).splitlines()
    ]
    assert {line[1]: line[-1] for line in shown[1:]} == {"text_encoder": "ok", "unet": "ok", "vae_decoder": "ok"}
    assert next(line[-3] for line in shown if line[1] == "unet") == "24.0", "what 6 bits may cost"


def test_verify_compares_with_the_loras_that_were_fused(
    app: typer.Typer, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, lora = tiny_checkpoint("sd1"), tmp_path / "style.safetensors"
    width = int(open_checkpoint(str(source)).models["text_encoder"].config["hidden_size"])
    layer = "lora_te_text_model_encoder_layers_0_self_attn_v_proj"
    parts = {f"{layer}.lora_down.weight": torch.ones(1, width), f"{layer}.lora_up.weight": torch.ones(width, 1)}
    save_file({**parts, f"{layer}.alpha": torch.tensor(1.0)}, lora)
    folder = write_text_encoder(
        tmp_path / "out", open_checkpoint(str(source), ConvertOptions(loras=[Lora(lora, 0.5)]))
    )
    result = CliRunner().invoke(app, ["verify", str(folder), "--against", str(source)])
    assert result.exit_code == 1
    assert "converted with --vae or --lora or --embedding?" in result.stderr
    assert run(app, "verify", folder, "--against", source, "--lora", f"{lora}:0.5").endswith("ok\n")


def test_verify_refuses_a_source_of_other_widths(
    app: typer.Typer, converted: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = {"last_hidden_state": np.zeros((1, 77, 64), np.float32)}
    expected = compare.Expected(({"input_ids": np.zeros((1, 77), np.float32)},), (wider,))
    monkeypatch.setattr(compare, "reference", lambda *_: expected)
    with pytest.raises(InputError) as raised:
        run(app, "verify", converted, "--against", tiny_checkpoint("sd1"))
    assert "its last_hidden_state is (1, 77, 32), and (1, 77, 64) of the source's network" in str(raised.value)


def test_verify_names_a_changed_file_of_the_tokenizer(
    app: typer.Typer, converted: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    packages = shutil.copytree(converted, tmp_path / "out") / "original" / "packages"
    with (packages / "merges.txt").open("a") as file:
        file.write("c d\n")
    with pytest.raises(PackageError, match=r"original/packages/manifest\.json: .*: merges\.txt has changed"):
        run(app, "verify", tmp_path / "out", "--against", tiny_checkpoint("sd1"))


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
    sha256 = integrity.hashes(packages, part.files)
    one_bit = manifest.Palettization(nbits=1, granularity="per_tensor")
    for claimed in ({}, {"psnr_db": {"last_hidden_state": 3.0}}, {"palettization": one_bit}):
        part = part.model_copy(update={"sha256": sha256, **claimed})
        manifest.write(described.model_copy(update={"components": {"text_encoder": part}}), packages)
        result = CliRunner().invoke(
            app, ["verify", str(tmp_path / "out"), "--against", str(tiny_checkpoint("sd1"))]
        )
        assert result.exit_code == 1, f"{claimed} in the manifest does not lower what is asked for"
    assert "FAILED" in result.stdout
    assert "differs from" in result.stderr
    assert "original/packages text_encoder; convert it again" in result.stderr
    (tmp_path / "a.zip").touch()
    for path, expected in ((tmp_path / "a.zip", "is a zip"), (tmp_path, "holds no models")):
        with pytest.raises(InputError, match=expected):
            run(app, "verify", path, "--against", tiny_checkpoint("sd1"))
