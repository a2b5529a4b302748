"""ControlNets and the UNet that they steer, in the contract of Apple's clients, computing what diffusers' do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.verification.folder import verify_models
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import InputError

RESIDUALS = [(2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4), (2, 64, 4, 4)]
"""Of the tiny SD 1 UNet: its first convolution, a layer, what is halved, a layer, the middle."""


@pytest.fixture(scope="session")
def options(controlnets: Callable[[str], Path]) -> ConvertOptions:
    """Those of `steered`."""
    return ConvertOptions("original", controlnets=sorted(controlnets("sd1").iterdir()))


@pytest.fixture(scope="session")
def packages(steered: Callable[[str], Path]) -> Manifest:
    return manifest.read(steered("sd1") / "original" / "packages")


def test_one_unet_for_all_of_them_and_each_by_its_name(packages: Manifest) -> None:
    prefix = "Stable_Diffusion_version_sd1"
    files = {name: one.files for name, one in packages.components.items() if "ontrol" in name or name == "unet"}
    assert files == {
        "unet": (f"{prefix}_unet.mlpackage",),
        "control_unet": (f"{prefix}_control-unet.mlpackage",),
        "ControlNet_edges_v1-tiny": ("ControlNet_edges_v1-tiny.mlpackage",),
        "ControlNet_shuffle": ("ControlNet_shuffle.mlpackage",),
        "ControlNet_tile": ("ControlNet_tile.mlpackage",),
    }
    assert {name: told.source.name for name, told in packages.controlnets.items()} == {
        "edges_v1-tiny": "edges_v1-tiny",
        "shuffle": "shuffle",
        "tile": "tile",
    }
    assert [name for name, told in packages.controlnets.items() if told.global_pool_conditions] == ["shuffle"]


def test_the_interfaces_are_apples(packages: Manifest) -> None:
    trio = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 32, 1, 77)}
    residuals = {f"additional_residual_{number}": shape for number, shape in enumerate(RESIDUALS)}
    unet, *nets = (packages.components[name] for name in packages.components if "ontrol" in name)
    assert {one.name: one.shape for one in unet.inputs} == {**trio, **residuals}
    assert {one.dtype for one in unet.inputs} == {"float16"}
    assert [(one.name, one.dtype) for one in unet.outputs] == [("noise_pred", "float32")]
    for net in nets:
        assert {one.name: one.shape for one in net.inputs} == {**trio, "controlnet_cond": (2, 3, 64, 64)}
        assert {one.dtype for one in net.inputs} == {"float16"}
        assert [(one.name, one.shape) for one in net.outputs] == list(residuals.items())
        assert {one.dtype for one in net.outputs} == {"float32"}  # Swift adds through pointers to Float32
        assert net.psnr_db.keys() == residuals.keys()


def test_compiled_they_have_the_names_of_apples_converter(steered: Callable[[str], Path]) -> None:
    described = manifest.read(steered("sd1") / "original" / "compiled").components
    files = {name: one.files for name, one in described.items() if "ontrol" in name}
    assert files == {
        "control_unet": ("ControlledUnet.mlmodelc",),
        "ControlNet_edges_v1-tiny": ("controlnet/EdgesV1Tiny.mlmodelc",),
        "ControlNet_shuffle": ("controlnet/Shuffle.mlmodelc",),
        "ControlNet_tile": ("controlnet/Tile.mlmodelc",),
    }
    folder = steered("sd1") / "original" / "compiled"
    assert sorted(path.name for path in (folder / "controlnet").iterdir()) == [
        "EdgesV1Tiny.mlmodelc",
        "Shuffle.mlmodelc",
        "Tile.mlmodelc",
    ]
    for name, digest in described["ControlNet_shuffle"].sha256.items():
        assert digest
        assert (folder / name).is_file()


def test_what_is_there_is_kept_and_what_is_missing_is_made_again(
    steered: Callable[[str], Path], options: ConvertOptions, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    models = shutil.copytree(steered("sd1"), tmp_path / "models")
    assert convert(tiny_checkpoint("sd1"), models, options).unchanged
    gone = models / "original" / "compiled" / "controlnet" / "Tile.mlmodelc"
    shutil.rmtree(gone)
    assert not convert(tiny_checkpoint("sd1"), models, options).unchanged
    assert (gone / "model.mil").is_file()
    assert not [path for path in models.rglob(".coreml-sd") if path.parent != models]


def test_they_are_verified_against_their_sources(
    steered: Callable[[str], Path],
    controlnets: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(steered("sd1") / "original" / "packages", tmp_path / "packages")
    found = manifest.read(folder)
    some = {name: one for name, one in found.components.items() if name in ("control_unet", "ControlNet_tile")}
    manifest.write(found.model_copy(update={"components": some}), folder)
    source = str(tiny_checkpoint("sd1"))
    with pytest.raises(InputError, match="sd1: has no ControlNet_tile"):
        list(
            verify_models(
                folder,
                open_checkpoint(source, ConvertOptions(controlnets=[str(controlnets("sd1") / "shuffle")])),
                print,
            )
        )
    with_tile = open_checkpoint(source, ConvertOptions(controlnets=[str(controlnets("sd1") / "tile")]))
    compared = {one.component: one.holds for one in verify_models(folder, with_tile, print)}
    assert compared == {"control_unet": True, "ControlNet_tile": True}


def test_options_that_say_nothing_are_refused(
    options: ConvertOptions, tiny_checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError, match="--only-controlled: does nothing without --controlnet: give one"):
        ConvertOptions(only_controlled=True)
    with pytest.raises(InputError, match="--lora-partial: does nothing without --lora: give one"):
        ConvertOptions(lora_partial=True)
    for nothing in ("", ","):
        with pytest.raises(InputError, match=f"--controlnet '{nothing}': names nothing"):
            ConvertOptions(controlnets=nothing)
    for more, said in (
        ({"nbits_for": {"ControlNet_none": 6}}, "ControlNet_none is not converted; what is: .*ControlNet_tile"),
        ({"components": "unet", "only_controlled": True}, "has no unet; it has text_encoder, control_unet"),
    ):
        with pytest.raises(InputError, match=said):
            convert(tiny_checkpoint("sd1"), "nowhere", replace(options, **more))
    assert not Path("nowhere").exists()
