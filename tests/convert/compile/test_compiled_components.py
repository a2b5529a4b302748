"""Components of tiny checkpoints, converted and compiled: read back equal, and computing the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diffusion_convert.checkpoint.diffusers_folder import open_folder
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.palettize.palettize_options import PER_GROUPED_CHANNEL, PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package
from diffusion_convert.verification.compare import psnr_db
from diffusion_runtime.backends import ComputeUnits, Model
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.families import AttentionKind, compiled_names
from diffusion_runtime.mil.program import Metadata
from read_back import check_read_back


@dataclass(frozen=True, slots=True)
class Case:
    """A component of a tiny checkpoint; targets differ in the dialect and in the versions of operations.

    ``palettes`` palettize it; ``wide`` are torch modules that stay in float32.
    """

    family: str
    component: str
    attention: AttentionKind = AttentionKind.ORIGINAL
    target: str = "macOS13"
    pixels: int = 64
    palettes: PalettizeOptions | None = None
    wide: frozenset[str] = frozenset()


CASES = (
    Case("sd1", "text_encoder", target="macOS14", palettes=PalettizeOptions(bits=6)),
    Case("sd1", "unet", AttentionKind.SPLIT_EINSUM_V2, pixels=256),
    Case(
        "sd1", "unet", AttentionKind.ORIGINAL, "macOS15", palettes=PalettizeOptions(3, None, PER_GROUPED_CHANNEL, 4)
    ),
    Case("sd1", "vae_decoder", wide=frozenset({"decoder.mid_block"})),
    Case("sd1", "safety_checker"),
    Case("sd2-depth", "depth_estimator"),
)


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case.component}-{case.attention.value}-{case.target}"
)
def models(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path, Path]:
    """A case, its package and its compiled model, which was read back and is equal."""
    case: Case = request.param
    component = table()[case.component]
    folder = tmp_path_factory.mktemp("components")
    checkpoint = open_folder(tiny_checkpoint(case.family), Source(name="tiny"))
    export_options = ExportOptions(
        case.attention, Shape(case.pixels, case.pixels, 2), case.target, float32_modules=case.wide
    )
    path = folder / "a.mlpackage"
    export(component, checkpoint, export_options, path, Metadata("tiny", user_defined={"b": "1", "a": "2"}))
    if case.palettes is not None:
        path, whole = folder / "palettized.mlpackage", path
        palettize_package(whole, path, case.palettes)
    return case, path, check_read_back(path, folder, *compiled_names(case.component))


def test_the_dialect_follows_the_specification(models: tuple[Case, Path, Path]) -> None:
    case, _, compiled = models
    first_line = (compiled / "model.mil").read_text().split("\n", 1)[0]
    assert first_line == ("program(1.3)" if case.target == "macOS15" else "program(1.0)")


def inputs(case: Case, model: Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {
        name: (random.random(spec.shape) * (13 if name == "input_ids" else 1)).astype(spec.dtype)
        for name, spec in model.inputs.items()
    }
    if case.component == "text_encoder":
        arrays = {name: np.floor(array) for name, array in arrays.items()}
    return arrays


def test_computes_the_same_bits(models: tuple[Case, Path, Path]) -> None:
    case, package, compiled = models
    loaded = [TorchBackend().load(path, ComputeUnits.ALL) for path in (package, compiled)]
    first, second = (model(**inputs(case, model)) for model in loaded)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


def test_fusing_leaves_results_within_80_db(models: tuple[Case, Path, Path]) -> None:
    case, package, _ = models
    plain, fused = (TorchBackend(fuse=fuse).load(package) for fuse in (False, True))
    expected, found = (model(**inputs(case, model)) for model in (plain, fused))
    for name, array in expected.items():
        assert psnr_db(array, found[name]) >= 80, name
    left = {node.meta.get("op") for node in fused.module.graph.nodes}
    assert not left & {"softmax", "sqrt", "einsum"}


def test_histogram_tells_the_attention(models: tuple[Case, Path, Path]) -> None:
    case, _, compiled = models
    (metadata,) = json.loads((compiled / "metadata.json").read_text())
    split = case.attention is not AttentionKind.ORIGINAL
    assert ("Ios16.einsum" in metadata["mlProgramOperationTypeHistogram"]) == split
    assert all(isinstance(value, str) for schema in metadata["inputSchema"] for value in schema.values())
