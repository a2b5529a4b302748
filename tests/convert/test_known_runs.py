"""A package whose program is that of one that was run is not run again: UNets that differ in attention alone."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert import convert
from diffusion_convert.conversion import palettized
from diffusion_convert.conversion.convert import Conversion
from diffusion_convert.export import export
from diffusion_convert.export.split_attention import Pieces, split
from diffusion_convert.options import ConvertOptions
from diffusion_convert.palettize.outputs import lowest_psnr_db, seeded_inputs
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.recipe import mix
from diffusion_convert.verification import compare
from diffusion_convert.verification.known_runs import KnownRuns, Run
from diffusion_runtime.backends.torch_mil import TorchBackend, TorchModel
from diffusion_runtime.coremltools_import import import_messages
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import operations

ALL = tuple(AttentionKind)
BOTH = (AttentionKind.ORIGINAL, AttentionKind.SPLIT_EINSUM_V2)
UNET = "unet/diffusion_pytorch_model.safetensors"


def unets(source: Path, output: Path, attention: tuple[AttentionKind, ...] = BOTH) -> Conversion:
    return convert(source, output, ConvertOptions(attention, components=("unet",), nbits=6, compiled=False))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each package that is run, in order: whether it is palettized, and whether its values are watched."""
    found: list[tuple[bool, bool]] = []
    observe_all = TorchModel.observe_all

    def observing(model: TorchModel, watch: Any, runs: Any) -> Any:
        found.append((any(one is model for one in small), watch is not None))
        return observe_all(model, watch, runs)

    small: list[TorchModel] = []
    load = TorchBackend.load

    def loading(backend: TorchBackend, path: Path, *given: Any, **named: Any) -> TorchModel:
        model = load(backend, path, *given, **named)
        if any(one.type == "constexpr_lut_to_dense" for one in operations(open_package(path).model.function.block)):
            small.append(model)
        return model

    monkeypatch.setattr(compare, "_measure", inspect.unwrap(compare._measure))
    monkeypatch.setattr(TorchModel, "observe_all", observing)
    monkeypatch.setattr(TorchBackend, "load", loading)
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_program_is_run_once(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, run: list[tuple[bool, bool]]
) -> None:
    """What is written is what each attention gives by itself, and so is its figure."""
    source = tiny_checkpoint(family)
    both = unets(source, tmp_path / "both")
    assert run == [(False, True), (True, False)]
    alone = unets(source, tmp_path / "alone", BOTH[1:])
    assert run[2:] == run[:2]
    made, own = (found.variants[BOTH[1].value].components["unet"] for found in (both, alone))
    assert made.sha256 == own.sha256
    assert made.palettization == own.palettization
    first = both.variants[BOTH[0].value].components["unet"]
    assert made.psnr_db == own.psnr_db == first.psnr_db


def test_so_it_is_with_16_bits_and_where_those_packages_were_there(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, run: list[tuple[bool, bool]]
) -> None:
    source, output = tiny_checkpoint("sd1"), tmp_path / "models"
    whole = convert(source, output, ConvertOptions(ALL, components=("unet",), compiled=False))
    assert run == [(False, True)]
    assert len({str(variant.components["unet"].psnr_db) for variant in whole.variants.values()}) == 1
    run.clear()
    made = unets(source, output)
    assert run == [(False, False), (True, False)]
    anew = unets(source, tmp_path / "anew")
    for kind in BOTH:
        one, other = (found.variants[kind.value].components["unet"] for found in (made, anew))
        assert one.sha256 == other.sha256
        assert one.psnr_db == pytest.approx(other.psnr_db, abs=0.01)


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl"])
def test_what_is_not_run_computes_the_same_operation_by_operation(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each attention as its package has it, nothing put together, against the package that was run."""
    options = ConvertOptions(ALL, components=("unet",), compiled=False)
    made = convert(tiny_checkpoint(family), tmp_path / "models", options)
    paths = [
        made.output / kind.value / "packages" / made.variants[kind.value].components["unet"].files[0]
        for kind in ALL
    ]
    inputs = seeded_inputs(TorchBackend().load(paths[0]).inputs, 2)
    backend = TorchBackend(fuse=False)
    first, *others = [[backend.load(path)(**arrays) for arrays in inputs] for path in paths]
    for other in others:
        assert lowest_psnr_db(first, other)["noise_pred"] > 100


@pytest.mark.usefixtures("nothing_remembered")
def test_an_attention_that_computes_something_else_is_refused(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    run: list[tuple[bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_one_head(model: Model, pieces: Mapping[str, Pieces], modules: Mapping[str, str]) -> Any:
        return split(model, {path: replace(one, heads=1) for path, one in pieces.items()}, modules)

    monkeypatch.setattr(export, "split", with_one_head)
    with pytest.raises(VerificationError, match="differs from the checkpoint's own network"):
        unets(tiny_checkpoint("sd1"), tmp_path / "models")
    assert run[:3] == [(False, True), (True, False), (False, True)]


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


def test_bits_by_weight_are_chosen_once(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def mixing(package: Path, options: PalettizeOptions, target: float) -> Any:
        asked.append(target)
        return mix(package, options, target)

    monkeypatch.setattr(palettized, "mix", mixing)
    options = ConvertOptions(BOTH, components=("unet",), target_bits=4.5, compiled=False)
    made = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    assert asked == [4.5]
    first, second = (made.variants[kind.value].components["unet"].palettization for kind in BOTH)
    assert first == second
    assert first is not None
    assert len(set(first.bits_by_weight.values())) > 1
    packages = [
        made.output / kind.value / "packages" / made.variants[kind.value].components["unet"].files[0]
        for kind in BOTH
    ]
    known = KnownRuns(tmp_path / "known")
    name = next(iter(first.bits_by_weight))
    assert known.bits(packages[0], 4.5, lambda: {name: 4}) == {name: 4}
    assert known.bits(packages[1], 4.5, lambda: {name: 6}) == {name: 4}
    assert known.bits(packages[1], 5, lambda: {name: 6}) == {name: 6}
    (kept,) = (tmp_path / "known").glob("*-4.5-bits.json")
    kept.write_text(kept.read_text().replace(name, f"{name}_2"))  # as where another weight has that name
    assert known.bits(packages[1], 4.5, lambda: {name: 8}) == {name: 8}


def test_a_run_is_for_the_inputs_and_the_interface_that_it_was_made_for(tiny_unet: Path, tmp_path: Path) -> None:
    """And what a power cut has left of one is none."""
    known = KnownRuns(tmp_path / "known")
    made: list[int] = []

    def run() -> Run:
        made.append(len(made))
        outputs = {"noise_pred": np.full(3, made[-1], np.float32)}
        return [outputs], {"noise_pred": 7.0, "noise_pred.scores": math.nan}

    inputs = seeded_inputs(TorchBackend().load(tiny_unet).inputs, 1)
    outputs, largest = known.once(tiny_unet, inputs, run, watched=True)
    again, sizes = known.once(tiny_unet, inputs, run, watched=True)
    assert made == [0]
    np.testing.assert_array_equal(outputs[0]["noise_pred"], again[0]["noise_pred"])
    np.testing.assert_equal(sizes, largest)
    known.once(tiny_unet, inputs, run, watched=False)
    known.once(tiny_unet, [{**inputs[0], "sample": inputs[0]["sample"] + np.float16(1)}], run, watched=True)
    changed = shutil.copytree(tiny_unet, tmp_path / "changed.mlpackage")
    (path,) = changed.rglob("model.mlmodel")
    model = import_messages("Model_pb2").Model()
    model.ParseFromString(path.read_bytes())
    kind = model.description.output[0].type.multiArrayType
    kind.dataType = kind.FLOAT16 if kind.dataType == kind.FLOAT32 else kind.FLOAT32
    path.write_bytes(model.SerializeToString())
    known.once(changed, inputs, run, watched=True)
    assert made == [0, 1, 2, 3]
    for file in (tmp_path / "known").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    known.once(tiny_unet, inputs, run, watched=True)
    assert made == [0, 1, 2, 3, 4]
