"""Variants, compiled names, zips and shared files; what existing apps check, from their public sources."""

from __future__ import annotations

import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub import ModelCard
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE

import small_bundle
from diffusion_convert.bundle.folder import BundleOptions, bundle_folder
from diffusion_convert.bundle.model_card import model_card, put_picture, write_model_card
from diffusion_convert.bundle.variants import (
    compile_variant,
    is_current,
    read_variants,
    required_variants,
    share_identical,
)
from diffusion_convert.bundle.zip_names import zip_name
from diffusion_convert.checkpoint.vocabulary import write_vocabulary
from diffusion_convert.cli.main import app
from diffusion_runtime import zips
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.find import find
from diffusion_runtime.bundle.integrity import check_files
from diffusion_runtime.errors import CheckpointError, InputError, PackageError
from diffusion_runtime.families import compiled_names
from diffusion_runtime.mil.package import open_package

ATTENTIONS = ("original", "split_einsum_v2")
ZIPS = BundleOptions(zips=True, card=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with compiled models and zips; shared: do not change it."""
    folder = small_bundle.write_bundle(tmp_path_factory.mktemp("bundle") / "out", ATTENTIONS)
    bundle_folder(folder, ZIPS)
    return folder


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiled_folder_holds_what_apps_look_for(bundle: Path, attention: str) -> None:
    compiled = bundle / attention / "compiled"
    assert {path.name for path in compiled.iterdir()} == {
        "TextEncoder.mlmodelc",
        "Unet.mlmodelc",
        "VAEDecoder.mlmodelc",
        "VAEEncoder.mlmodelc",
        "vocab.json",
        "merges.txt",
        "manifest.json",
    }
    for model in compiled.glob("*.mlmodelc"):
        assert {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()} == {
            "analytics/coremldata.bin",
            "coremldata.bin",
            "metadata.json",
            "model.mil",
            "weights/weight.bin",
        }


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_apps_find_attention_size_and_guidance_in_metadata(bundle: Path, attention: str) -> None:
    compiled = bundle / attention / "compiled"
    found = {path.stem: json.loads((path / "metadata.json").read_text()) for path in compiled.glob("*.mlmodelc")}
    assert all(isinstance(entries, list) and len(entries) == 1 for entries in found.values())
    unet = found["Unet"][0]
    # Mochi Diffusion and GuernikaKit tell split attention by this one key.
    assert ("Ios16.einsum" in unet["mlProgramOperationTypeHistogram"]) == (attention != "original")
    assert all(isinstance(count, int) for count in unet["mlProgramOperationTypeHistogram"].values())
    for (entry,) in found.values():
        for schema in entry["inputSchema"]:
            assert all(isinstance(value, str) for value in schema.values())
    # Mochi Diffusion reads the picture's size from the encoder's first input; Apple the latents' from the UNet's.
    shape = [int(size) for size in found["VAEEncoder"][0]["inputSchema"][0]["shape"].strip("[]").split(", ")]
    assert shape == [1, 3, small_bundle.PICTURE, small_bundle.PICTURE]
    sample = next(schema for schema in unet["inputSchema"] if schema["name"] == "sample")
    assert (sample["shape"], sample["dataType"]) == ("[2, 4, 8, 8]", "Float16")
    # Swift takes the first output.
    for name in ("Unet", "VAEDecoder", "VAEEncoder"):
        assert len(found[name][0]["outputSchema"]) == 1


def test_compiled_manifest_names_its_own_files_with_hashes(bundle: Path) -> None:
    packages = manifest.read(bundle / "original" / "packages")
    compiled = manifest.read(bundle / "original" / "compiled")
    assert compiled.kind == "compiled"
    assert compiled.components["unet"].files == ("Unet.mlmodelc",)
    assert set(compiled.components["unet"].sha256) == {
        f"Unet.mlmodelc/{name}"
        for name in (
            "analytics/coremldata.bin",
            "coremldata.bin",
            "metadata.json",
            "model.mil",
            "weights/weight.bin",
        )
    }
    assert compiled.components["unet"].psnr_db == packages.components["unet"].psnr_db
    check_files(compiled, bundle / "original" / "compiled")


def test_compiled_models_read_back_equal_to_their_packages(bundle: Path) -> None:
    for attention in ATTENTIONS:
        sides = [manifest.read(bundle / attention / kind) for kind in ("packages", "compiled")]
        for name in sides[0].components:
            models = [
                open_package(bundle / attention / side.kind / file).model
                for side in sides
                for file in side.components[name].files
            ]
            functions = [model.program.functions["main"] for model in models]
            assert functions[0].block == functions[1].block
            assert models[0].interfaces == models[1].interfaces


def test_a_chunked_unet_has_the_names_that_apps_prefer() -> None:
    chunked = manifest.Component(files=("a.mlpackage", "b.mlpackage"), inputs=(), outputs=())
    assert compiled_names("unet", len(chunked.files)) == ("UnetChunk1", "UnetChunk2")


def test_compiled_models_of_other_packages_are_not_current(tmp_path: Path) -> None:
    variant = small_bundle.write_bundle(tmp_path, ("original",)) / "original"
    compiled = compile_variant(variant / "packages", variant / "compiled")
    made = manifest.read(variant / "packages")
    assert is_current(made, compiled)
    assert not is_current(made.model_copy(update={"tools": {"conversion": "another"}}), compiled)


def test_zips_are_named_for_apps_and_their_folder_is_the_stem(bundle: Path) -> None:
    names = {path.name for path in bundle.glob("*.zip")}
    assert names == {
        "coreml-tiny-diffusion-v1-4_original_compiled.zip",
        "coreml-tiny-diffusion-v1-4_split_einsum_v2_compiled.zip",
        "coreml-tiny-diffusion-v1-4_split_einsum_compiled.zip",
    }
    for path in bundle.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            assert {name.split("/")[0] for name in archive.namelist()} == {path.stem}
            assert f"{path.stem}/Unet.mlmodelc/metadata.json" in archive.namelist()
            assert (
                archive.getinfo(f"{path.stem}/Unet.mlmodelc/weights/weight.bin").compress_type == zipfile.ZIP_STORED
            )


def test_split_einsum_keeps_its_own_zip_name_and_palettized_models_say_so(tmp_path: Path) -> None:
    folder = small_bundle.write_bundle(tmp_path, ("split_einsum", "split_einsum_v2"), nbits=6)
    assert [path.name for path in bundle_folder(folder, ZIPS).zips] == [
        "coreml-tiny-diffusion-v1-4-palettized_split_einsum_v2_compiled.zip",
        "coreml-tiny-diffusion-v1-4-palettized_split_einsum_compiled.zip",
    ]
    with zipfile.ZipFile(folder / "coreml-tiny-diffusion-v1-4-palettized_split_einsum_compiled.zip") as archive:
        stem = "coreml-tiny-diffusion-v1-4-palettized_split_einsum_compiled"
        assert json.loads(archive.read(f"{stem}/manifest.json"))["attention"] == "split_einsum"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CompVis/stable-diffusion-v1-4", "coreml-stable-diffusion-v1-4_original_compiled.zip"),
        ("My Model: final!", "coreml-my-model-final_original_compiled.zip"),
        ("/home/me/shapes/", "coreml-shapes_original_compiled.zip"),
    ],
)
def test_zip_names_are_plain(bundle: Path, name: str, expected: str) -> None:
    made = manifest.read(bundle / "original" / "compiled").model_copy(update={"name": name})
    assert zip_name(made, "original") == expected


def test_zipping_and_compiling_again_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    again = small_bundle.write_bundle(tmp_path, ATTENTIONS)
    for path in bundle_folder(again, ZIPS).zips:
        assert path.read_bytes() == (bundle / path.name).read_bytes()


def test_an_unpacked_zip_is_a_bundle(bundle: Path, tmp_path: Path) -> None:
    zipped = next(bundle.glob("*_split_einsum_v2_compiled.zip"))
    folder = zips.unpack(zipped, tmp_path / "unpacked")
    assert folder == tmp_path / "unpacked" / zipped.stem
    assert find(tmp_path / "unpacked").folder == folder
    with pytest.raises(InputError, match=rf"is a zip: unpack it \(`unzip {re.escape(zipped.name)} -d"):
        find(zipped)
    check_files(manifest.read(folder), folder)


def test_equal_files_of_variants_become_one_on_disk(tmp_path: Path) -> None:
    folder = small_bundle.write_bundle(tmp_path, ATTENTIONS)
    for attention in ATTENTIONS:
        compile_variant(folder / attention / "packages", folder / attention / "compiled")
    found = read_variants(folder)
    weights = [
        folder
        / attention
        / "packages"
        / f"{small_bundle.NAME}_vae_decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        for attention in ATTENTIONS
    ]
    weights += [
        folder / attention / "compiled" / "VAEDecoder.mlmodelc/weights/weight.bin" for attention in ATTENTIONS
    ]
    assert weights[0].samefile(weights[2])
    assert not weights[0].samefile(weights[1])
    assert share_identical(folder, found) > 0
    assert all(weights[0].samefile(other) for other in weights)
    for attention, kinds in found.items():
        for kind, made in kinds.items():
            check_files(made, folder / attention / kind)
    assert share_identical(folder, found) == 0


@pytest.mark.parametrize("damage", ["missing", "changed", "link"])
def test_files_that_do_not_fit_the_manifest_are_refused(damage: str, tmp_path: Path) -> None:
    packages = small_bundle.write_bundle(tmp_path / "bundle", ("original",)) / "original" / "packages"
    weights = packages / f"{small_bundle.NAME}_unet.mlpackage" / "Data/com.apple.CoreML/weights/weight.bin"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "changed":
        weights.write_bytes(data[:-1] + b"\xff")
    if damage == "link":
        (tmp_path / "outside.bin").write_bytes(data)
        weights.symlink_to(tmp_path / "outside.bin")
    expected = {"missing": "is missing", "changed": "has changed", "link": "leads outside of the folder"}[damage]
    with pytest.raises(PackageError, match=expected) as caught:
        compile_variant(packages, packages.parent / "compiled")
    assert "\n" not in str(caught.value)
    assert not (packages.parent / "compiled").exists()


def test_a_manifest_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    packages = small_bundle.write_bundle(tmp_path, ("original",)) / "original" / "packages"
    path = packages / manifest.FILE_NAME
    path.write_text(path.read_text().replace(f"{small_bundle.NAME}_unet.mlpackage", "../../evil.mlpackage"))
    with pytest.raises(PackageError, match="does not stay inside the folder"):
        manifest.read(packages)


def test_a_folder_without_variants_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path)) + ": holds no variant"):
        required_variants(tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        required_variants(tmp_path / "nowhere")


def test_vocabulary_comes_from_slow_and_fast_tokenizers_alike(tmp_path: Path) -> None:
    fast = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    fast.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    write_vocabulary({"tokenizer.json": tmp_path / "tokenizer.json"}, tmp_path)
    expected = {"a": 0, "b": 1, "ab": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    assert json.loads((tmp_path / "vocab.json").read_text()) == expected
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\na b\n"
    slow = {name: tmp_path / name for name in ("vocab.json", "merges.txt")}
    (tmp_path / "copy").mkdir()
    write_vocabulary(slow, tmp_path / "copy")
    assert (tmp_path / "copy" / "merges.txt").read_text() == "#version: 0.2\na b\n"
    with pytest.raises(CheckpointError, match=r"neither vocab\.json and merges\.txt nor tokenizer\.json"):
        write_vocabulary({}, tmp_path)


def test_model_card_has_the_hubs_header_and_what_a_user_needs(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.PNG")
    put_picture(tmp_path / "drawn.PNG", bundle)
    text = write_model_card(bundle, read_variants(bundle)).read_text()
    header = vars(ModelCard(text).data)
    assert header["license"] == "creativeml-openrail-m"
    assert header["base_model"] == "maker/tiny-diffusion-v1-4"
    assert header["pipeline_tag"] == "text-to-image"
    assert "core-ml" in header["tags"]
    for expected in (
        "![A picture made with these models](sample.png)",
        "`original` | CPU and GPU",
        "coreml-tiny-diffusion-v1-4_split_einsum_v2_compiled.zip",
        "Mochi Diffusion",
        "StableDiffusionSample",
        "coreml-sd generate",
        "72.5 dB",
        "restricts use",
        "at revision `0000",
    ):
        assert expected in text
    (bundle / "sample.png").unlink()
    (bundle / "README.md").unlink()


def test_the_card_claims_no_more_than_was_measured(bundle: Path) -> None:
    made = manifest.read(bundle / "original" / "compiled")
    unmeasured = {name: part.model_copy(update={"psnr_db": {}}) for name, part in made.components.items()}
    text = model_card({"original": made.model_copy(update={"components": unmeasured})}, {})
    assert "These models were not compared with their source." in text
    assert "were run and compared" not in text
    six_bits = made.components["unet"].model_copy(update={"palettization": manifest.Palettization(nbits=6)})
    text = model_card({"original": made.model_copy(update={"components": {**unmeasured, "unet": six_bits}})}, {})
    assert "The models that have a figure here were run and compared" in text
    assert "| `original` | unet | 6 bits |" in text
    assert "compared with their own 16-bit form" in text


def test_the_cards_commands_are_those_that_the_program_has(bundle: Path) -> None:
    made = manifest.read(bundle / "original" / "compiled")
    lines = model_card({"original": made}, {}).replace("\\\n", " ").splitlines()
    ours = [shlex.split(line) for line in lines if line.startswith("coreml-sd ")]
    assert [words[1] for words in ours] == ["download", "generate"]
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for _, name, *arguments in ours:
        commands[name].make_context(name, arguments)
    swift = next(line for line in lines if line.startswith("swift run"))
    assert shlex.split(swift)[3] == "a photograph of an astronaut riding a horse"
    assert swift.endswith("--resource-path models/original/compiled --compute-units cpuAndGPU")


@pytest.mark.parametrize(
    ("license", "header"),
    [
        ("creativeml-openrail-m", {"license": "creativeml-openrail-m", "license_name": None}),
        ("My Own License: v2!", {"license": "other", "license_name": "my-own-license-v2"}),
        (None, {"license": "unknown", "license_name": None}),
    ],
)
def test_the_license_is_carried_over(bundle: Path, license: str | None, header: dict[str, str | None]) -> None:
    made = manifest.read(bundle / "original" / "compiled")
    made = made.model_copy(update={"source": made.source.model_copy(update={"license": license})})
    text = model_card({"original": made}, {})
    data = vars(ModelCard(text).data)
    assert {key: data.get(key) for key in header} == header
    assert (license or "names no license") in text


def test_what_is_no_picture_is_not_put_on_the_card(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    for name, expected in (("a.png", "not a picture"), ("a.txt", "expected a picture"), ("b.png", "no such file")):
        with pytest.raises(InputError, match=expected):
            put_picture(tmp_path / name, bundle)
    assert not list(bundle.glob("sample*"))
