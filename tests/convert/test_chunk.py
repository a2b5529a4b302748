"""A UNet in two packages computes what it computes in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_convert import chunk as chunking
from diffusion_convert.checkpoint.diffusers_folder import open_folder
from diffusion_convert.chunk import MAX_IMBALANCE, Cut, chunk, find_cut, halves
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package
from diffusion_runtime.backends.torch_mil import TorchBackend, TorchModel
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import InputError, UnsupportedError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import open_package, write_package
from diffusion_runtime.mil.program import DType, Metadata, TensorType, Variable
from read_back import check_read_back

# Bits are equal up to the cut; after it, torch sums in another order where a value's layout in memory is another.
SAME_DB = 110.0

Chunked = tuple[Path, Path, Path, Cut]


@pytest.fixture(scope="module", params=["float16", "palettized"])
def chunked(
    request: pytest.FixtureRequest,
    unet: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Chunked:
    """A whole UNet, its halves, and how it was cut."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = unet
    if request.param == "palettized":
        whole = folder / "whole.mlpackage"
        palettize_package(unet, whole, PalettizeOptions(bits=6))
    first, second = folder / "first.mlpackage", folder / "second.mlpackage"
    return whole, first, second, chunk(whole, first, second)


@pytest.fixture(scope="module")
def unet(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = open_folder(tiny_checkpoint("sd1"), Source(name="tiny"))
    path = tmp_path_factory.mktemp("unet") / "unet.mlpackage"
    export_options = ExportOptions(AttentionKind.SPLIT_EINSUM, Shape(64, 64, 2), "macOS13")
    export(table()["unet"], checkpoint, export_options, path, Metadata(description="A UNet.", license="MIT"))
    return path


def load(path: Path) -> TorchModel:
    return TorchBackend(fuse=False).load(path)


def draw(model: TorchModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(spec.shape).astype(spec.dtype) for name, spec in model.inputs.items()}


def psnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    error = np.sqrt(np.mean((wanted - got) ** 2, dtype=np.float64))
    return float("inf") if error == 0 else float(20 * np.log10(np.abs(wanted).max() / error))


def test_compiled_halves_read_back_equal(chunked: Chunked, tmp_path: Path) -> None:
    for number, half in enumerate(chunked[1:3], 1):
        check_read_back(half, tmp_path, f"UnetChunk{number}")


def test_halves_run_one_after_the_other_equal_the_whole(chunked: Chunked) -> None:
    whole, first, second = (load(path) for path in chunked[:3])
    arrays = draw(whole)
    carried = first(**{name: arrays[name] for name in first.inputs})
    passing = {value.declared.name: value.name for value in chunked[3].crossing}
    assert set(carried) == set(passing)
    original = whole.intermediates(list(passing.values()), **arrays)
    for name, inner in passing.items():
        np.testing.assert_array_equal(carried[name], original[inner])
    got = second(**{name: {**arrays, **carried}[name] for name in second.inputs})
    wanted = whole(**arrays)
    assert set(got) == set(wanted) == {"noise_pred"}
    assert psnr_db(wanted["noise_pred"], got["noise_pred"]) >= SAME_DB


def test_weights_are_divided_evenly_and_none_is_lost(chunked: Chunked) -> None:
    sizes = [(path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size for path in chunked[:3]]
    assert max(sizes[1:]) <= (1 + MAX_IMBALANCE) * min(sizes[1:])
    # Only small constants that both halves use are stored twice.
    assert sizes[0] <= sizes[1] + sizes[2] <= 1.05 * sizes[0]
    assert chunked[3].imbalance <= MAX_IMBALANCE


def test_every_operation_is_in_one_half_as_it_was(chunked: Chunked) -> None:
    def steps(path: Path) -> list[tuple[str, str]]:
        (function,) = open_package(path).model.program.functions.values()
        return [
            (operation.type, operation.outputs[0].name)
            for operation in function.block.operations
            if operation.type != "const" and not operation.type.startswith("constexpr_")
        ]

    through = {value.declared.name for value in chunked[3].crossing}
    whole, first, second = (steps(path) for path in chunked[:3])
    casts = {("cast", name) for name in through}
    narrow = {("cast", value.name) for value in chunked[3].crossing}
    assert [step for step in first if step not in casts] + [step for step in second if step not in narrow] == whole


def test_interfaces_are_what_apps_expect(chunked: Chunked) -> None:
    """Outputs are float32, and the second half takes the first one's by the same names."""
    whole, first, second = (open_package(path).model for path in chunked[:3])
    carried = {feature.name: (feature.shape, feature.dtype) for feature in first.interface.outputs}
    assert {dtype for _, dtype in carried.values()} == {"Float32"}
    taken = {feature.name: (feature.shape, feature.dtype) for feature in second.interface.inputs}
    originals = {feature.name for feature in whole.interface.inputs}
    assert carried.items() <= taken.items()
    assert set(taken) - set(carried) <= originals
    assert {feature.name for feature in first.interface.inputs} <= originals
    assert second.interface.outputs == whole.interface.outputs
    assert all(feature.description for feature in first.interface.outputs)
    assert "first" in first.metadata.description
    assert "second" in second.metadata.description
    assert first.metadata.license == second.metadata.license == "MIT"


def test_palettized_weights_stay_packed(chunked: Chunked) -> None:
    def packed(path: Path) -> int:
        (function,) = open_package(path).model.program.functions.values()
        return sum(operation.type == "constexpr_lut_to_dense" for operation in function.block.operations)

    counts = [packed(path) for path in chunked[:3]]
    assert counts[1] + counts[2] == counts[0]
    assert (counts[0] > 0) == (chunked[0].name == "whole.mlpackage")


def test_few_values_cross(unet: Path) -> None:
    """Of the even cuts, one with the fewest crossing values is taken."""
    package = open_package(unet)
    (function,) = package.model.program.functions.values()
    even = [cut for cut in chunking._Steps(function).cuts() if cut.imbalance <= MAX_IMBALANCE]
    assert len(even) > 10
    assert len(find_cut(package).crossing) == min(len(cut.crossing) for cut in even)


@pytest.mark.parametrize(("bytes_", "taken"), [(1100, "few"), (1101, "even")])
def test_few_crossing_values_are_worth_a_tenth_more_weights_in_one_half(
    unet: Path, monkeypatch: pytest.MonkeyPatch, bytes_: int, taken: str
) -> None:
    package = open_package(unet)
    even = replace(find_cut(package), first_bytes=1000, second_bytes=1000)
    cuts = {"even": even, "few": Cut(1, (), 1000, bytes_)}
    monkeypatch.setattr(chunking._Steps, "cuts", lambda _: iter(cuts.values()))
    assert find_cut(package) == cuts[taken]


def test_a_value_of_float32_crosses_as_it_is(unet: Path) -> None:
    wide = chunking.Crossing("x", TensorType(DType.FLOAT32, (2, 3)), (2, 3))
    assert wide.declared == Variable("x", TensorType(DType.FLOAT32, (2, 3)))
    assert wide.feature.name == "x"


def test_neither_half_appears_where_the_second_cannot_be_written(
    unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(model: Model, path: Path, weights: Path | None) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write_package(model, path, weights)

    monkeypatch.setattr(chunking, "write_package", full)
    with pytest.raises(OSError, match="No space left"):
        chunk(unet, tmp_path / "first.mlpackage", tmp_path / "second.mlpackage")
    assert written
    assert not list(tmp_path.iterdir())


def test_what_is_no_package_is_refused(unet: Path, tmp_path: Path) -> None:
    model = unet / "Data/com.apple.CoreML/model.mlmodel"
    with pytest.raises(InputError, match=r"only an \.mlpackage can be cut"):
        chunk(model, tmp_path / "first.mlpackage", tmp_path / "second.mlpackage")


def test_a_program_that_cannot_be_cut_is_refused(unet: Path, tmp_path: Path) -> None:
    """The first operations of a first half hold no weights to divide."""
    package = open_package(unet)
    (function,) = package.model.program.functions.values()
    early = next(chunking._Steps(function).cuts())
    first, _ = halves(package, Cut(2, early.crossing[:1], 1, 1))
    assert not list(chunking._Steps(next(iter(first.program.functions.values()))).cuts())
    with pytest.raises(UnsupportedError, match="cannot be cut"):
        find_cut(type(package)(package.path, package.root, first))
