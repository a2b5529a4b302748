"""What `convert` writes passes every check of the Swift clients: folders, zips, chunks, each attention."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import swift_clients
from diffusion_convert import convert
from diffusion_convert.bundle.zip_names import stem_of
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.mil.package import open_package
from swift_clients import CHECKS, Folder

pytestmark = pytest.mark.slow

Made = tuple[Path, bool, int]
CONVERSIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "both attentions, 6 bits": ("sd1", {"nbits": 6}),
    "in two, a batch of one, iOS 17": (
        "sd1",
        {"attention": "split_einsum", "chunk_unet": True, "batch_size": 1, "target": "iOS17"},
    ),
    "one operation for attention": ("sd1", {"attention": "original", "target": "macOS15"}),
    "SD 2": ("sd2-v", {"attention": "original"}),
    "SDXL": ("sdxl", {"attention": ("original", "split_einsum_v2")}),
    "SDXL with its refiner, 6 bits": ("sdxl", {"nbits": 6, "refiner": "sdxl-refiner"}),
    "SDXL with its refiner, both in two": (
        "sdxl",
        {"attention": "split_einsum", "chunk_unet": True, "refiner": "sdxl-refiner"},
    ),
    "SDXL's refiner alone": ("sdxl-refiner", {}),
    "steered by ControlNets alone, in two, 6 bits": (
        "sd1",
        {"attention": "split_einsum", "chunk_unet": True, "nbits": 6, "only_controlled": True, "controlnets": True},
    ),
}


@pytest.fixture(scope="module", params=CONVERSIONS)
def made(
    request: pytest.FixtureRequest,
    converted: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    controlnets: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """Verified only where that is done already: it is what other tests are for."""
    family, options = CONVERSIONS[request.param]
    output = tmp_path_factory.mktemp("swift") / "models"
    refiner = tiny_checkpoint(options["refiner"]) if "refiner" in options else None
    if is_plain := options.keys() <= {"attention"}:
        shutil.copytree(converted(family), output)  # what is left is added to it
    nets = sorted(controlnets("sd1").iterdir()) if "controlnets" in options else ()
    asked = ConvertOptions(**{**options, "refiner": refiner, "controlnets": nets}, verify=is_plain)
    convert(tiny_checkpoint(family), output, asked)
    return output, family.startswith("sdxl"), int(refiner is not None or family == "sdxl-refiner")


def folders(made: Made, to: Path) -> dict[str, Folder]:
    """The compiled models of each variant, and what is in each zip, by what they are."""
    output, xl, refiners = made
    found = {}
    for variant in sorted(path for path in output.iterdir() if (path / "compiled").is_dir()):
        found[f"{variant.name}/compiled"] = Folder(variant / "compiled", variant.name, xl, refiners)
    for path in sorted(output.glob("*.zip")):
        attention = path.stem.removesuffix("_compiled").removeprefix(f"{stem_of(path.name)}_")
        found[path.name] = Folder(swift_clients.unpacked(path, to), attention, xl, refiners)
    return found


def test_every_folder_and_zip_passes_every_check(made: Made, tmp_path: Path) -> None:
    found = folders(made, tmp_path)
    assert any(name.endswith(".zip") for name in found)
    faults = []
    for name, folder in found.items():
        for check in CHECKS:
            try:
                check(folder)
            except (AssertionError, KeyError, ValueError, OSError) as error:
                faults.append(f"{name}: {check.__name__}: {error}")
    assert not faults, "\n".join(faults)


def test_zips_have_the_names_that_are_asked_for(made: Made) -> None:
    output, _, _ = made
    zips = {path.name for path in output.glob("*.zip")}
    repository = next(stem_of(name) or "" for name in zips)
    asked = set(swift_clients.zip_urls(f"maker/{repository}"))
    assert zips <= asked
    variants = {path.name for path in output.iterdir() if (path / "compiled").is_dir()}
    assert {f"{repository}_{variant}_compiled.zip" for variant in variants} <= zips
    if "split_einsum_v2" in variants:
        assert f"{repository}_split_einsum_compiled.zip" in zips


def test_packages_have_the_names_and_shapes_that_apples_python_client_reads(made: Made) -> None:
    output, _, _ = made
    for packages in output.glob("*/packages"):
        paths = sorted(packages.glob("*.mlpackage"))
        assert paths
        for path in paths:
            assert path.stem.startswith(("Stable_Diffusion_version_", "ControlNet_"))
            model = open_package(path).model
            assert all(one.shape and one.dtype in ("Float16", "Float32") for one in model.interface.inputs)


# --- the checks themselves find what they look for


@pytest.fixture(scope="module")
def plain(converted: Callable[..., Path]) -> Path:
    return converted("sd1", compiled=True) / "original" / "compiled"


def spoil_metadata(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / f"{name}.mlmodelc" / "metadata.json"
    (found,) = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps([found]))


def port(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in (*found["inputSchema"], *found["outputSchema"]) if one["name"] == name)


SPOILT: Mapping[str, Callable[[Path], object]] = {
    "files_have_the_names_of_resource_urls": lambda f: (f / "Unet.mlmodelc").rename(f / "UNet.mlmodelc"),
    "compiled_models_have_what_core_ml_loads": lambda f: (f / "Unet.mlmodelc" / "model.mil").unlink(),
    "vocabulary_is_numbers_by_token": lambda f: (f / "vocab.json").write_text('{"a": 1}'),
    "merges_are_pairs": lambda f: (f / "merges.txt").write_text("#version\na b c\n"),
    "text_encoders_take_one_row_of_tokens": lambda f: spoil_metadata(
        f, "TextEncoder", lambda m: port(m, "input_ids").update(dataType="Int32")
    ),
    "text_encoders_give_what_is_looked_for": lambda f: spoil_metadata(
        f, "TextEncoder", lambda m: port(m, "last_hidden_state").update(name="hidden_embeds")
    ),
    "unet_takes_what_is_fed": lambda f: spoil_metadata(f, "Unet", lambda m: port(m, "timestep").update(name="t")),
    "unet_has_these_ranks": lambda f: spoil_metadata(
        f, "Unet", lambda m: port(m, "encoder_hidden_states").update(shape="[2, 77, 32]")
    ),
    "the_first_output_is_the_one_that_is_meant": lambda f: spoil_metadata(
        f, "VAEDecoder", lambda m: m["outputSchema"].append({"name": "also", "shape": "[1]"})
    ),
    "vae_takes_one_input": lambda f: spoil_metadata(f, "VAEDecoder", lambda m: port(m, "z").update(shape="[1, 4]")),
    "safety_checker_takes_what_is_fed": lambda f: spoil_metadata(
        f, "SafetyChecker", lambda m: port(m, "clip_input").update(shape="[1, 3, 336, 336]")
    ),
    "safety_checker_takes_512x512": lambda f: spoil_metadata(
        f, "SafetyChecker", lambda m: port(m, "images").update(shape="[1, 64, 64, 3]", enumeratedShapes="[]")
    ),
    "schemas_hold_texts_alone": lambda f: spoil_metadata(
        f, "Unet", lambda m: port(m, "sample").update(isOptional=False)
    ),
    "histograms_are_counts": lambda f: spoil_metadata(
        f, "Unet", lambda m: m.update(mlProgramOperationTypeHistogram={})
    ),
    "split_attention_shows_in_the_histogram": lambda f: spoil_metadata(
        f, "Unet", lambda m: m["mlProgramOperationTypeHistogram"].update({"Ios16.einsum": 1})
    ),
    "xl_shows_in_the_unets_inputs": lambda f: spoil_metadata(
        f,
        "Unet",
        lambda m: (port(m, "sample").update(name="time_ids"), port(m, "timestep").update(name="text_embeds")),
    ),
    "the_size_shows_in_the_encoders_first_input": lambda f: spoil_metadata(
        f, "VAEEncoder", lambda m: port(m, "x").update(shape="[1, 3, 64]")
    ),
    "metadata_decodes_as_guernikas": lambda f: spoil_metadata(
        f, "Unet", lambda m: m["userDefinedMetadata"].update(steps=1)
    ),
    "states_tell_the_hidden_size": lambda f: spoil_metadata(
        f, "Unet", lambda m: port(m, "encoder_hidden_states").update(shape="[2, 77, 32]")
    ),
    "prediction_type_is_told": lambda f: spoil_metadata(
        f, "Unet", lambda m: m["userDefinedMetadata"].pop("prediction_type")
    ),
    "shapes_and_types_are_those_that_python_reads": lambda f: spoil_metadata(
        f, "Unet", lambda m: port(m, "sample").update(dataType="Int32")
    ),
}


STEERED: Mapping[str, Callable[[Path], object]] = {
    "a_controlnet_takes_what_is_fed": lambda f: spoil_metadata(
        f, "controlnet/Shuffle", lambda m: port(m, "timestep").update(shape="[1]")
    ),
    "the_unet_takes_what_controlnets_give": lambda f: spoil_metadata(
        f, "controlnet/Shuffle", lambda m: port(m, "additional_residual_0").update(dataType="Float16")
    ),
    "mochi_lists_controlnets": lambda f: spoil_metadata(
        f, "controlnet/Shuffle", lambda m: port(m, "controlnet_cond").update(shape="[2, 3, 512, 512]")
    ),
}
"""Of models with ControlNets."""


@pytest.mark.parametrize("name", STEERED)
def test_checks_of_controlnets_find_what_is_wrong(
    name: str, steered: Callable[[str], Path], tmp_path: Path
) -> None:
    compiled = steered("sd1") / "original" / "compiled"
    for check in CHECKS:
        check(Folder(compiled, "original"))
    spoilt = shutil.copytree(compiled, tmp_path / "compiled")
    STEERED[name](spoilt)
    with pytest.raises(AssertionError):
        next(one for one in CHECKS if one.__name__ == name)(Folder(spoilt, "original"))


@pytest.mark.parametrize("name", SPOILT)
def test_checks_find_what_is_wrong(name: str, plain: Path, tmp_path: Path) -> None:
    check = next(one for one in CHECKS if one.__name__ == name)
    check(Folder(plain, "original"))
    spoilt = shutil.copytree(plain, tmp_path / "compiled")
    SPOILT[name](spoilt)
    with pytest.raises((AssertionError, KeyError, ValueError, StopIteration)):
        check(Folder(spoilt, "original"))


def test_every_check_is_tried() -> None:
    left_out = {"chunks_hand_on_what_the_next_one_takes", "a_refiner_takes_what_is_fed"}  # tried below
    assert {check.__name__ for check in CHECKS} == SPOILT.keys() | STEERED.keys() | left_out


def test_a_refiner_that_takes_something_else_is_found(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "compiled")
    shutil.copytree(folder / "Unet.mlmodelc", folder / "UnetRefiner.mlmodelc")
    with pytest.raises(KeyError, match="time_ids"):
        swift_clients.a_refiner_takes_what_is_fed(Folder(folder, "original", refiners=1))


def test_chunks_that_do_not_fit_are_found(plain: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(plain, tmp_path / "compiled")
    for name in ("UnetChunk1", "UnetChunk2"):
        shutil.copytree(cut / "Unet.mlmodelc", cut / f"{name}.mlmodelc")
    swift_clients.chunks_hand_on_what_the_next_one_takes(Folder(cut, "original"))
    spoil_metadata(cut, "UnetChunk2", lambda m: port(m, "sample").update(name="unknown"))
    with pytest.raises(AssertionError):
        swift_clients.chunks_hand_on_what_the_next_one_takes(Folder(cut, "original"))
