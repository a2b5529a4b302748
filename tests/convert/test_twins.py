"""Palettized packages for several attentions: the first is followed back to the checkpoint's own network, the
others to the first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert import convert
from diffusion_convert.conversion import palettized
from diffusion_convert.conversion.convert import Conversion
from diffusion_convert.export import export
from diffusion_convert.export.split_attention import Pieces, split
from diffusion_convert.options import ConvertOptions
from diffusion_convert.verification import compare
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import operations

BOTH = (AttentionKind.ORIGINAL, AttentionKind.SPLIT_EINSUM_V2)
UNET = "unet/diffusion_pytorch_model.safetensors"


def unets(source: Path, output: Path, attention: tuple[AttentionKind, ...] = BOTH) -> Conversion:
    return convert(source, output, ConvertOptions(attention, components=("unet",), nbits=6, compiled=False))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each package that is measured is palettized, in order."""
    found: list[bool] = []
    measure = compare.measure

    def measuring(path: Path, *given: object) -> compare.Verdict:
        block = open_package(path).model.function.block
        found.append(any(one.type == "constexpr_lut_to_dense" for one in operations(block)))
        return measure(path, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "measure", measuring)
    return found


def test_the_16_bit_package_of_one_attention_is_run(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, run: list[bool]
) -> None:
    """What is written is what each attention gives by itself, and so is its figure."""
    source = tiny_checkpoint("sd1")
    both = unets(source, tmp_path / "both")
    assert run == [False, True]
    alone = unets(source, tmp_path / "alone", BOTH[1:])
    assert run[2:] == [False]
    made, own = (found.variants[BOTH[1].value].components["unet"] for found in (both, alone))
    assert made.sha256 == own.sha256
    assert made.palettization == own.palettization
    assert made.psnr_db == pytest.approx(own.psnr_db, abs=0.01)
    first = both.variants[BOTH[0].value].components["unet"]
    assert made.psnr_db == pytest.approx(first.psnr_db, abs=0.01)


def test_so_it_is_where_the_16_bit_packages_were_there(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, run: list[bool]
) -> None:
    source, output = tiny_checkpoint("sd1"), tmp_path / "models"
    convert(source, output, ConvertOptions(BOTH, components=("unet",), compiled=False))
    run.clear()
    made = unets(source, output)
    assert run == [True]
    anew = unets(source, tmp_path / "anew")
    for kind in BOTH:
        one, other = (found.variants[kind.value].components["unet"] for found in (made, anew))
        assert one.sha256 == other.sha256
        assert one.psnr_db == pytest.approx(other.psnr_db, abs=0.01)


@pytest.mark.usefixtures("nothing_remembered")
def test_an_attention_that_computes_something_else_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, run: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_one_head(model: Model, pieces: Mapping[str, Pieces], modules: Mapping[str, str]) -> Any:
        return split(model, {path: replace(one, heads=1) for path, one in pieces.items()}, modules)

    monkeypatch.setattr(export, "split", with_one_head)
    with pytest.raises(VerificationError, match="differs from the checkpoint's own network"):
        unets(tiny_checkpoint("sd1"), tmp_path / "models")
    assert run == [False, True, False]


def test_an_operation_that_float16_has_no_room_for_is_cured_in_each(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A UNet that begins with values 20,000 times larger; its norms bring them down again."""
    source = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "loud")
    weights = load_file(source / UNET)
    for name in ("conv_in.weight", "conv_in.bias"):
        weights[name] = (weights[name].float() * 2e4).to(torch.float32)
    save_file(weights, source / UNET)
    made = unets(source, tmp_path / "models").variants
    first, second = (made[kind.value].components["unet"] for kind in BOTH)
    assert first.float32_ops
    assert len(first.float32_ops) == len(second.float32_ops)


def test_one_that_is_nearly_the_other_is_not_taken_for_it(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, run: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(palettized, "MIN_TWIN_PSNR_DB", 190.0)
    made = unets(tiny_checkpoint("sd1"), tmp_path / "models")
    assert run == [False, True, False]
    assert set(made.variants) == {kind.value for kind in BOTH}
