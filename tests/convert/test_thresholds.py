"""Figures that decide whether models are published: each test fails where its figure is moved (see
tools/mutation_check.py). What is measured here stands in numbers of its own, not in the source's."""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_convert import convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.conversion import part, workspace
from diffusion_convert.options import ConvertOptions
from diffusion_convert.palettize.outputs import lowest_psnr_db, outputs_of_both, require_outputs, seeded_inputs
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package
from diffusion_convert.verification import compare
from diffusion_convert.verification.folder import Comparison, verify_models
from diffusion_runtime import zips
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import PackageError, StorageError, VerificationError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.lower import Stored
from diffusion_runtime.mil.package import open_package

OPTIONS = ConvertOptions(
    attention=(AttentionKind.ORIGINAL,), components=("text_encoder",), nbits_for={"text_encoder": 6}, compiled=False
)


@pytest.fixture(scope="module")
def palettized(tiny_checkpoint: Callable[[str], Path], build_once: Callable[..., Path]) -> Path:
    """A text encoder with weights of 6 bits, whose record says how far they are from 16-bit ones."""
    source = tiny_checkpoint("sd1")
    return build_once("palettized", lambda to: convert(source, to / "models", OPTIONS)) / "models"


def verified(models: Path, source: Path) -> Comparison:
    (found,) = verify_models(models, open_checkpoint(str(source)), lambda _: None)
    return found


def with_record(models: Path, to: Path, psnr_db: float | None, **palettization: float) -> Path:
    """A copy whose manifest records that figure for every output."""
    copy = shutil.copytree(models, to) / "original" / "packages"
    made = manifest.read(copy)
    component = made.components["text_encoder"]
    assert component.palettization is not None
    changed = component.model_copy(
        update={
            "psnr_db": {} if psnr_db is None else dict.fromkeys(component.psnr_db, psnr_db),
            "palettization": component.palettization.model_copy(update=palettization),
        }
    )
    manifest.write(made.model_copy(update={"components": {"text_encoder": changed}}), copy)
    return to


@pytest.mark.parametrize(("above", "holds"), [(0.5, True), (2.0, False)])
def test_verify_lets_a_figure_be_a_decibel_below_its_record(
    above: float, holds: bool, palettized: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Other processors round otherwise; what is further off was changed after it was measured."""
    source = tiny_checkpoint("sd1")
    worst = min(verified(palettized, source).psnr_db.values())
    recorded = with_record(palettized, tmp_path / "models", worst + above)
    assert verified(recorded, source).holds == holds


def test_a_record_that_claims_little_does_not_lower_the_bound(
    palettized: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever the manifest says, weights of 6 bits keep 24 dB."""
    for number, (psnr_db, bits) in enumerate(((5.0, 6.0), (None, 6.0), (None, 2.0))):
        models = with_record(palettized, tmp_path / str(number), psnr_db, nbits=bits)
        assert verified(models, tiny_checkpoint("sd1")).bound_db == pytest.approx(24.0)


def test_the_16_bit_forms_own_noise_is_allowed_for(
    palettized: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """60 dB of palettization on 60 dB of rounding are 57 dB, less a decibel."""
    models = with_record(palettized, tmp_path / "models", 60.0)
    assert verified(models, tiny_checkpoint("sd1")).bound_db == pytest.approx(56.0, abs=0.05)


@pytest.mark.parametrize("name", table())
def test_no_component_is_published_below_60_db(name: str) -> None:
    def passes(psnr_db: float) -> None:
        verdict = compare.Verdict({"good": 90.0, "other": psnr_db}, {}, ())
        compare.check(table()[name], Path("a.mlpackage"), verdict, lambda: "")

    passes(60.0)
    for below in (59.9, float("nan"), float("-inf")):
        with pytest.raises(VerificationError, match="other"):
            passes(below)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_bounds_of_bits_are_near_what_bits_keep(bits: int, tiny_unet: Path, tmp_path: Path) -> None:
    """A network of random weights passes with room for worse ones (5 dB); 20 dB less, as where another weight's
    table is used, are refused at every width."""
    palettize_package(tiny_unet, tmp_path / "small.mlpackage", PalettizeOptions(bits=bits))
    kept = lowest_psnr_db(*outputs_of_both(tiny_unet, tmp_path / "small.mlpackage"))["noise_pred"]
    require_outputs(Path("unet.mlpackage"), {"noise_pred": kept - 5}, bits)
    for bad in (kept - 20, 2.9):
        with pytest.raises(VerificationError, match="noise_pred"):
            require_outputs(Path("unet.mlpackage"), {"noise_pred": bad}, bits)


def test_two_calls_are_compared_side_by_side(
    tiny_unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each package's weights are read once for both, and the figures are those of calls by themselves."""
    small = tmp_path / "small.mlpackage"
    palettize_package(tiny_unet, small, PalettizeOptions(bits=4))
    whole, few = (TorchBackend().load(package) for package in (tiny_unet, small))
    samples = seeded_inputs(whole.inputs, 2)
    alone = [compare.psnr_db(whole(**one)["noise_pred"], few(**one)["noise_pred"]) for one in samples]
    read: list[Stored] = []
    forward = Stored.forward

    def reading(stored: Stored) -> torch.Tensor:
        read.append(stored)
        return forward(stored)

    monkeypatch.setattr(Stored, "forward", reading)
    assert lowest_psnr_db(*outputs_of_both(tiny_unet, small))["noise_pred"] == pytest.approx(min(alone), abs=0.01)
    assert len(read) == len(set(read)) > 0


def test_three_bits_lie_between_two_and_four() -> None:
    require_outputs(Path("unet.mlpackage"), {"noise_pred": 14.0}, 3)
    with pytest.raises(VerificationError):
        require_outputs(Path("unet.mlpackage"), {"noise_pred": 6.0}, 3)


def test_halves_that_differ_a_little_from_the_whole_are_refused(tiny_unet: Path, tmp_path: Path) -> None:
    """8 bits are 52 dB away; halves of the same weights are equal but for the order of sums."""
    from diffusion_convert.chunk import chunk

    halves = (tmp_path / "first.mlpackage", tmp_path / "second.mlpackage")
    chunk(tiny_unet, *halves)
    random = np.random.default_rng(0)
    arrays = {
        "sample": random.standard_normal((2, 4, 8, 8)).astype(np.float16),
        "timestep": np.array([500, 500], np.float16),
        "encoder_hidden_states": random.standard_normal((2, 32, 1, 77)).astype(np.float16),
    }
    part._check_chain(tiny_unet, halves, arrays)
    palettize_package(tiny_unet, tmp_path / "whole.mlpackage", PalettizeOptions(bits=8))
    chunk(tmp_path / "whole.mlpackage", *halves)
    with pytest.raises(VerificationError, match="differ from the whole"):
        part._check_chain(tiny_unet, halves, arrays)


def test_a_conversion_leaves_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_050 << 20))
    workspace.check_space(tmp_path, 980 << 20)
    with pytest.raises(StorageError, match="are needed"):
        workspace.check_space(tmp_path, 990 << 20)


def test_values_beyond_the_limit_are_found(tiny_unet: Path) -> None:
    package = open_package(tiny_unet)
    name = next(op.outputs[0].name for op in package.model.function.block.operations if op.type == "conv")
    for size, found in ((99.0, False), (101.0, True), (math.nan, True)):
        assert (name in compare.overflowing(tiny_unet, {name: size}, 100.0)) == found


def test_undefined_values_are_no_small_ones(tiny_unet: Path) -> None:
    model = TorchBackend().load(tiny_unet)
    defined, undefined = seeded_inputs(model.inputs, 2)
    expected = compare.Expected((defined, undefined, defined), ({}, {}, {}))
    undefined["sample"][0, 0, 0, 0] = math.nan
    verdict = compare.measure(tiny_unet, expected, lambda _: None)
    assert math.isnan(verdict.largest["sample"])
    found = compare.overflowing(tiny_unet, verdict.largest, 1e9)
    assert len(found) > 20
    assert all(math.isnan(size) for size in found.values())


@pytest.mark.parametrize(
    ("names", "refused"), [(5_000, False), (5_001, True), ("a/" * 15, False), ("a/" * 16, True)]
)
def test_zips_of_too_much_are_refused(names: int | str, refused: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(names if isinstance(names, int) else 1):
            archive.writestr(f"{names}b" if isinstance(names, str) else f"m/{number}", b"")
    with pytest.raises(PackageError, match="refused") if refused else nullcontext():
        zips.unpack(tmp_path / "a.zip", tmp_path / "out", wanted=lambda name: name.endswith(("b", "/0")))
