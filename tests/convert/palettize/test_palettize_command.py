"""`coreml-sd palettize`, as a user types it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from diffusion_convert.cli.palettize import palettize
from diffusion_convert.palettize.palettize_package import folder_bytes
from diffusion_runtime.coremltools_import import import_coremltools


@pytest.fixture(scope="module")
def command() -> Callable[..., Result]:
    app = typer.Typer()
    app.command()(palettize)
    app.callback()(lambda: None)

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(app, ["palettize", *map(str, arguments)], env={"COLUMNS": "160"})

    return run


def test_six_bits_are_the_default(
    command: Callable[..., Result], tiny_package: Callable[..., Path], tmp_path: Path
) -> None:
    result = command(tiny_package("iOS16"), "-o", tmp_path / "out.mlpackage")
    assert result.exit_code == 0, result.output
    assert "4 weights at 6.00 bits" in result.output
    assert "dB PSNR against the input package" in result.output
    assert folder_bytes(tmp_path / "out.mlpackage") < folder_bytes(tiny_package("iOS16"))


def test_mixed_bits_with_recipe_and_plot(
    command: Callable[..., Result], tiny_package: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    source, recipe = tiny_package("iOS18"), tmp_path / "recipe.json"
    options = ("--target-bits", 4.5, "--save-recipe", recipe, "--plot", tmp_path / "plot.png")
    result = command(source, "-o", tmp_path / "one.mlpackage", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(recipe.read_text())["average_bits"] <= 4.5
    assert (tmp_path / "plot.png").stat().st_size > 1000
    result = command(source, "-o", tmp_path / "two.mlpackage", "--recipe", recipe, "--no-check")
    assert result.exit_code == 0, result.output
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    one, two = ((tmp_path / f"{name}.mlpackage" / weights).read_bytes() for name in ("one", "two"))
    assert one == two


def test_groups(command: Callable[..., Result], tiny_package: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--nbits", 3, "--granularity", "per-grouped-channel", "--group-size", 8, "--embeddings")
    result = command(tiny_package("iOS18"), "-o", tmp_path / "out.mlpackage", *options)
    assert result.exit_code == 0, result.output
    assert "5 weights at 3.00 bits" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nbits", 6, "--target-bits", 4.5), "exclude each other"),
        (("--plot", "plot.png"), "--target-bits"),
        (("--nbits", 5), "5 bits"),
        (("--nbits", 0), "0 bits"),
        (("-o", "u.txt"), "expected a name that ends in .mlpackage"),
        (("--target-bits", 0.5), "expected 1 to 8"),
    ],
)
def test_options_that_contradict_are_refused(
    command: Callable[..., Result],
    tiny_package: Callable[..., Path],
    tmp_path: Path,
    options: tuple[Any, ...],
    message: str,
) -> None:
    result = command(tiny_package("iOS16"), "-o", tmp_path / "out.mlpackage", *options)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_neither_the_input_nor_what_is_no_package_is_replaced(
    command: Callable[..., Result], tiny_package: Callable[..., Path], tmp_path: Path
) -> None:
    source, other = tmp_path / "in.mlpackage", tmp_path / "other.mlpackage"
    shutil.copytree(tiny_package("iOS16"), source)
    other.mkdir()
    (other / "kept").touch()
    before = folder_bytes(tmp_path)
    same = tmp_path / "folder" / ".." / source.name
    for output, message in ((source, "is the input"), (same, "is the input"), (other, "is no package")):
        result = command(source, "-o", output)
        assert message in str(result.exception)
    assert folder_bytes(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {source.name, other.name}


def test_a_package_that_overflows_by_itself_is_blamed_and_samples_are_offered(
    command: Callable[..., Result], tiny_package: Callable[..., Path], tmp_path: Path
) -> None:
    """Inputs as large as these overflow in any package; with inputs from use the same package passes."""
    source, output = tiny_package("iOS16"), tmp_path / "out.mlpackage"
    x, ids = np.zeros((2, 1, 8, 16, 16), np.float32), np.zeros((2, 1, 5), np.int32)
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    rows: tuple[tuple[np.ndarray, str], ...] = (
        (np.sign(x) * np.float32(3e38), "its own output .* is infinite"),
        (np.full_like(x, np.inf), "input x"),
    )
    for bad, message in rows:
        np.savez(tmp_path / "bad.npz", x=bad, ids=ids)
        result = command(source, "-o", output, "--samples", tmp_path / "bad.npz")
        assert re.search(f"{message}.*--samples FILE.npz.*--no-check", str(result.exception)), result.exception
        assert not output.exists()
    np.savez(tmp_path / "good.npz", x=x, ids=ids)
    result = command(source, "-o", output, "--samples", tmp_path / "good.npz")
    assert result.exit_code == 0, result.output


def test_a_package_that_is_chaotic_is_blamed_and_samples_are_offered(
    command: Callable[..., Result], tmp_path: Path
) -> None:
    """Sines of numbers in the ten thousands: a thousandth more of them, and each is another."""
    ct, mb = import_coremltools(), import_coremltools("converters.mil").Builder
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)

    @mb.program(input_specs=[mb.TensorSpec((1, 64))], opset_version=ct.target.iOS16)  # type: ignore[untyped-decorator]
    def network(x: Any) -> Any:
        rows = mb.linear(x=x, weight=weight, bias=np.zeros(64, np.float32))
        return mb.sin(x=mb.mul(x=rows, y=np.float32(1e4)), name="wild")

    model = ct.convert(network, minimum_deployment_target=ct.target.iOS16, skip_model_load=True,
                       compute_precision=ct.precision.FLOAT32)  # fmt: skip
    model.save(str(tmp_path / "wild.mlpackage"))
    output = tmp_path / "out.mlpackage"
    result = command(tmp_path / "wild.mlpackage", "-o", output, "--nbits", "8")
    expected = r"wild\.mlpackage: its own output wild is chaotic .*--samples FILE\.npz.*--no-check"
    assert re.search(expected, str(result.exception)), result.exception
    assert not output.exists()
    np.savez(tmp_path / "small.npz", x=np.full((1, 64), 1e-6, np.float32))
    assert command(tmp_path / "wild.mlpackage", "-o", output, "--samples", tmp_path / "small.npz").exit_code == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "cannot be read as an .npz file"),
        ({"y": np.zeros(3)}, "holds y; expected"),
        ({"x": np.zeros((3, 3)), "ids": np.zeros((1, 5))}, "expected numbers"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    command: Callable[..., Result],
    tiny_package: Callable[..., Path],
    tmp_path: Path,
    arrays: dict[str, np.ndarray] | None,
    message: str,
) -> None:
    path = tmp_path / "samples.npz"
    if arrays is None:
        path.write_bytes(b"no zip")
    else:
        np.savez(path, **arrays)  # type: ignore[arg-type]
    result = command(tiny_package("iOS16"), "-o", tmp_path / "out.mlpackage", "--samples", path)
    assert message in str(result.exception)
