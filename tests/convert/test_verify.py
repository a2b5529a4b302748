"""Verification finds what is wrong, and says where it begins."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from diffusion_convert import convert
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.torch_networks import build
from diffusion_convert.components import table
from diffusion_convert.components.component import Graph, Shape
from diffusion_convert.components.unet import UNet
from diffusion_convert.export import export as export_module
from diffusion_convert.export.export import Exported, ExportOptions, export
from diffusion_convert.networks.attention import ATTENTION, original
from diffusion_convert.options import ConvertOptions
from diffusion_convert.palettize.checked import palettize_checked
from diffusion_convert.palettize.outputs import seeded_inputs
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.verification import compare
from diffusion_convert.verification.known_runs import Arrays
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil import observe
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import Metadata

ENCODER = table()["vae_encoder"]
SHAPE = Shape(64, 64, 2)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint("sd1")))


@pytest.fixture
def package(checkpoint: Checkpoint, tmp_path: Path) -> tuple[Path, Exported]:
    path = tmp_path / "encoder.mlpackage"
    return path, export(
        ENCODER, checkpoint, ExportOptions(AttentionKind.ORIGINAL, SHAPE, "macOS13"), path, Metadata()
    )


def silent(_: float) -> None:
    pass


def damage(path: Path, weight: str) -> None:
    """Overwrite a weight in a package with another."""
    package = open_package(path)
    block = package.model.program.functions["main"].block
    value = next(op for op in block.operations if op.outputs[0].name.startswith(weight)).attributes["val"]
    offset = package.array(value).ctypes.data - package.weight_file(value.data)._bytes.ctypes.data  # type: ignore[arg-type]
    size = package.array(value).nbytes
    with next(path.rglob("weight.bin")).open("r+b") as file:
        file.seek(offset)
        file.write(np.linspace(-0.1, 0.1, size // 2).astype(np.float16).tobytes())


def test_first_divergence_is_named(checkpoint: Checkpoint, package: tuple[Path, Exported]) -> None:
    path, made = package
    expected = compare.reference(ENCODER, checkpoint, SHAPE, silent)
    assert compare.measure(path, expected, silent).psnr_db["latent"] > ENCODER.min_psnr_db
    damage(path, "encoder_down_blocks_1_resnets_0_conv1_weight")
    verdict = compare.measure(path, expected, silent)
    network = ENCODER.build(checkpoint, AttentionKind.ORIGINAL, SHAPE).module

    def explain() -> str:
        return compare.first_divergence(path, network, made.modules, expected.inputs[0])

    with pytest.raises(VerificationError, match=r"encoder\.down_blocks\.1\.resnets\.0\.conv1\)") as raised:
        compare.check(ENCODER, path, verdict, explain)
    assert "latent" in str(raised.value)
    assert "\n" not in str(raised.value)


def other_states(unet: UNet, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Each row with the prompt of the other; the network that it is compared with takes its own."""
    found: torch.Tensor = FORWARD(
        unet, sample, timestep, torch.cat([states[1:], states[:1]]) if unet.channels_first else states
    )
    return found


def without_mask(*arguments: Any) -> torch.Tensor:
    return original.attend(*arguments[:5])


def other_bias(array: np.ndarray, placeholders: Any) -> np.ndarray:
    stored: np.ndarray = STORED(array, placeholders)
    wrong: np.ndarray = stored + np.ones_like(stored) * (stored.shape == (64,))  # fc1's
    return wrong


FORWARD, STORED = UNet.forward, export_module._stored
MISTAKES: dict[str, tuple[str, Any]] = {
    "an input that is swapped": ("unet", mock.patch.object(UNet, "forward", other_states)),
    "an attention without its mask": (
        "text_encoder",
        mock.patch.dict(ATTENTION, {AttentionKind.ORIGINAL: without_mask}),
    ),
    "a wrong weight": ("text_encoder", mock.patch.object(export_module, "_stored", other_bias)),
}


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize(("component", "mistake"), MISTAKES.values(), ids=MISTAKES)
def test_no_mistake_is_published(
    component: str, mistake: Any, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ConvertOptions(attention=(AttentionKind.ORIGINAL,), components=(component,), compiled=False)
    with mistake, pytest.raises(VerificationError, match="the first operation that differs is"):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize(
    ("name", "pixels", "batches"),
    [("unet", 4 * 64 * 64, [4]), ("unet", 4 * 64 * 64 - 1, [2, 2]), ("text_encoder", 2**20, [1, 1, 1])],
)
def test_runs_are_rows_of_one_batch_where_all_is_by_rows_and_small(
    name: str, pixels: int, batches: list[int], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PIXELS_TOGETHER", pixels)
    component, compute, built = table()[name], compare._outputs, torch_networks.build
    ran: list[int] = []
    networks: dict[str, list[weakref.ref[torch.nn.Module]]] = {}

    def alone(of: Checkpoint, subfolder: str) -> torch.nn.Module:
        earlier = networks.setdefault(subfolder, [])  # a UNet's inputs are a text encoder's outputs
        assert not any(network() for network in earlier)  # each maps the checkpoint
        network = built(of, subfolder)
        earlier.append(weakref.ref(network))
        return network

    def watched(graph: Graph, arrays: Arrays) -> Arrays:
        ran.extend(len(array) for array in list(arrays.values())[:1])
        return compute(graph, arrays)

    with monkeypatch.context() as patched:
        patched.setattr(compare, "_outputs", watched)
        patched.setattr(torch_networks, "build", alone)
        found = compare.reference(component, checkpoint, SHAPE, silent)
    assert ran == batches
    assert len(networks[name]) > 1
    graph = component.build(checkpoint, None, SHAPE)
    for arrays, outputs in zip(found.inputs, found.outputs, strict=True):
        for output, array in compute(graph, arrays).items():
            assert outputs[output].shape == array.shape
            assert compare.psnr_db(array, outputs[output]) > 110


def test_reference_survives_the_disk(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = compare.reference(table()["text_encoder"], checkpoint, SHAPE, silent)
    expected.save(tmp_path / "reference.npz")
    loaded = compare.Expected.load(tmp_path / "reference.npz")
    assert len(loaded.inputs) == table()["text_encoder"].runs
    for before, after in zip((*expected.inputs, *expected.outputs), (*loaded.inputs, *loaded.outputs), strict=True):
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert all(before[name].dtype == after[name].dtype for name in before)


def test_inputs_are_seeded(checkpoint: Checkpoint) -> None:
    for component in table().values():
        if component.subfolder in checkpoint.models:
            sample = component.build(checkpoint, None, SHAPE).sample
            first, again, other = sample(0), sample(0), sample(1)
            assert all(np.array_equal(first[name], again[name]) for name in first)
            assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_widened_network_is_the_float32_one(checkpoint: Checkpoint) -> None:
    network = build(checkpoint, "vae")
    stored = {name: value.data_ptr() for name, value in network.state_dict().items()}
    x = torch.randn(1, 3, 64, 64)
    with compare.widened(network), torch.no_grad():
        found = network.encode(x).latent_dist.mean  # type: ignore[operator]
    # The whole is not called, but its modules are; quant_conv is one of them.
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == stored
    assert all(value.dtype == torch.float16 for value in network.state_dict().values())
    with torch.no_grad():
        assert torch.equal(found, network.float().encode(x).latent_dist.mean)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("expected", "found", "psnr"),
    [
        ([1.0, -2.0], [1.0, -2.0], compare.BEST_PSNR_DB),
        ([0.0, 0.0], [0.0, 0.0], compare.BEST_PSNR_DB),
        ([0.0, 0.0], [0.0, 1.0], -math.inf),
        ([1.0, 2.0], [1.0, math.nan], -math.inf),
        ([1.0, 2.0], [1.0, math.inf], -math.inf),
        ([10.0, 0.0], [10.0, 0.1 * math.sqrt(2)], 40.0),
    ],
)
def test_psnr(expected: list[float], found: list[float], psnr: float) -> None:
    value = compare.psnr_db(np.array(expected, np.float32), np.array(found, np.float32))
    assert value == pytest.approx(psnr, abs=1e-4)


def test_palettization_takes_the_outputs_of_the_verdict(
    tiny_unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 16-bit package is not run once more."""
    model = TorchBackend().load(tiny_unet)
    inputs = seeded_inputs(model.inputs, 2)
    expected = compare.Expected(tuple(inputs), tuple(model(**arrays) for arrays in inputs))
    outputs = compare.measure(tiny_unet, expected, silent).outputs
    anew = palettize_checked(tiny_unet, tmp_path / "anew.mlpackage", PalettizeOptions(6), samples=inputs)
    run: list[Path] = []
    load = TorchBackend.load

    def watched(backend: TorchBackend, path: Path, **named: Any) -> Any:
        run.append(path)
        return load(backend, path, **named)

    monkeypatch.setattr(TorchBackend, "load", watched)
    output = tmp_path / "known.mlpackage"
    known = palettize_checked(tiny_unet, output, PalettizeOptions(6), samples=inputs, expected=outputs)
    assert len(run) == 1
    assert tiny_unet not in run
    assert known.psnr_db == pytest.approx(anew.psnr_db, abs=0.01)


def test_large_scores_are_traced_to_their_operations(tiny_unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores may be large, the program is watched again with each operation of an attention apart."""
    model = TorchBackend(fuse=False).load(tiny_unet)
    inputs = seeded_inputs(model.inputs, 1)
    apart: dict[str, float] = {}
    moved: set[str] = set()

    def watch(name: str, op: str, value: torch.Tensor) -> None:
        apart[name] = max(apart.get(name, 0.0), float(value.abs().max()))
        moved.update([name] if op in compare.MOVES else [])

    outputs = model.observe(watch, **inputs[0])
    expected = compare.Expected(tuple(inputs), (outputs,))
    usual = compare.measure(tiny_unet, expected, lambda _: None)
    monkeypatch.setattr(observe, "FAR", 0.0)
    again = compare.measure(tiny_unet, expected, lambda _: None)
    kept = {name for name in usual.largest if not name.endswith(observe.SCORES)}
    assert kept - moved < again.largest.keys() < apart.keys()  # heads that are joined are an attention's value
    for verdict, names in ((usual, kept), (again, again.largest.keys())):
        assert min(verdict.psnr_db.values()) > 100
        for name in names:
            assert verdict.largest[name] == pytest.approx(apart[name], rel=1e-3), name
