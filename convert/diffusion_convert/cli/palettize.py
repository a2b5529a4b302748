"""`coreml-sd palettize`: options -> a checked package, and tables of what it cost."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_runtime.cli import interruption
from diffusion_runtime.errors import InputError, VerificationError
from diffusion_runtime.real_path import real_path

if TYPE_CHECKING:
    import numpy as np

    from diffusion_convert.palettize.checked import Checked
    from diffusion_convert.palettize.palettize_options import PalettizeOptions
    from diffusion_convert.palettize.palettize_package import OnWeight
    from diffusion_convert.palettize.recipe import Mixed

_DEFAULT_BITS = 6
_OTHER_INPUTS = "give inputs from use with --samples FILE.npz, or leave out the check with --no-check"


class Granularity(enum.Enum):
    """The value is the spelling on the command line."""

    PER_TENSOR = "per-tensor"
    PER_GROUPED_CHANNEL = "per-grouped-channel"


def palettize(
    package: Annotated[Path, typer.Argument(help="An ML Program (.mlpackage) with float weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .mlpackage to write.")],
    nbits: Annotated[int | None, typer.Option(help="Bits per weight: 1, 2, 3, 4, 6 or 8 (default 6).")] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Average bits; each weight gets its own, for the least damage.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Bits per weight from a file of --save-recipe.")] = None,
    save_recipe: Annotated[Path | None, typer.Option(help="Write the bits per weight as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of PSNR against size (--target-bits).")] = None,
    granularity: Annotated[Granularity, typer.Option(help="Groups need iOS 18.")] = Granularity.PER_TENSOR,
    group_size: Annotated[int, typer.Option(help="Output channels that share a palette.")] = 16,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Palettize embedding tables too.")] = False,
    samples: Annotated[
        Path | None, typer.Option(help="An .npz file with the inputs to check with, by name. Default: drawn ones.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare outputs with the input package's (runs both).")] = True,
) -> None:
    """Palettize the weights of any ML Program, and check the result."""
    from diffusion_convert.palettize.checked import palettize_checked
    from diffusion_convert.palettize.palettize_options import PalettizeOptions
    from diffusion_convert.palettize.recipe import mix

    if sum(value is not None for value in (nbits, target_bits, recipe)) > 1:
        raise InputError("--nbits, --target-bits and --recipe exclude each other: give one")
    _check_output(package, output)
    if plot is not None and target_bits is None:
        raise InputError("--plot shows the recipes that --target-bits chooses from: give both")
    options = PalettizeOptions(
        _DEFAULT_BITS if nbits is None else nbits, None, granularity.value, group_size, embeddings
    )
    mixed = None
    if recipe is not None:
        options = _recipe_options(package, recipe)
    elif target_bits is not None:
        mixed = mix(package, options, target_bits)
        options = mixed.options
    given = None if samples is None else _samples(samples, package)
    with _progress() as progress:
        try:
            checked = palettize_checked(package, output, options, samples=given, compare=check, progress=progress)
        except VerificationError as error:
            raise VerificationError(f"{error}; {_OTHER_INPUTS}") from error
    if mixed is not None and plot is not None:
        _plot(mixed, plot, package.name)
    if save_recipe is not None:
        _save(package, checked, save_recipe)
    _print(checked, output)


def _samples(path: Path, package: Path) -> list[dict[str, np.ndarray]]:
    from diffusion_convert.palettize.outputs import load_samples
    from diffusion_runtime.backends.interface import specs
    from diffusion_runtime.mil.package import open_package

    return load_samples(path, specs(open_package(package).model.interface.inputs, package))


def _check_output(package: Path, output: Path) -> None:
    if output.suffix != ".mlpackage":
        raise InputError(f"--output {output}: expected a name that ends in .mlpackage")
    where, source = real_path(output), real_path(package)
    if (
        where.is_relative_to(source)
        or source.is_relative_to(where)
        or (output.exists() and output.samefile(package))
    ):
        raise InputError(f"--output {output}: is the input {package} or lies in it; give another name")
    if output.exists() and not (output / "Manifest.json").is_file():
        raise InputError(f"--output {output}: exists and is no package; remove it or give another name")


def _recipe_options(package: Path, recipe: Path) -> PalettizeOptions:
    from diffusion_convert.palettize.recipe import load_recipe
    from diffusion_runtime.mil.package import open_package

    return load_recipe(recipe).options(open_package(package))


def _plot(mixed: Mixed, path: Path, title: str) -> None:
    from diffusion_convert.palettize.plot import candidate, plot_recipes

    chosen = candidate(mixed.damage, mixed.options.bits_by_weight or {})
    plot_recipes(mixed.damage, mixed.widths, path, title, chosen)


def _save(package: Path, checked: Checked, path: Path) -> None:
    from diffusion_convert.palettize.recipe import Recipe, package_identity, save_recipe
    from diffusion_runtime.mil.package import open_package

    report = checked.report
    recipe = Recipe(
        package=package.name,
        sha256=package_identity(open_package(package)),
        average_bits=round(report.average_bits, 4),
        granularity=report.options.granularity,
        group_size=report.options.group_size,
        bits={weight.name: weight.bits for weight in report.weights},
    )
    save_recipe(recipe, path)


@contextmanager
def _progress() -> Iterator[OnWeight]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("palettizing", total=None)

        def show(name: str, done: int, total: int) -> None:
            interruption.check()
            bar.update(task, completed=done, total=total, description=name if done < total else "checking")

        yield show


def _print(checked: Checked, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    report = checked.report
    table = Table(title="weights with the lowest signal-to-noise ratio", title_justify="left")
    for heading in ("weight", "shape", "bits", "dB"):
        table.add_column(heading, justify="left" if heading == "weight" else "right", overflow="fold")
    for weight in report.worst():
        table.add_row(weight.name, "x".join(map(str, weight.shape)), str(weight.bits), f"{weight.snr_db:.1f}")
    console = Console()
    console.print(table)
    for name, value in checked.psnr_db.items():
        console.print(f"{name}: {value:.1f} dB PSNR against the input package")
    share = report.bytes_after / report.bytes_before
    console.print(
        f"{output}: {len(report.weights)} weights at {report.average_bits:.2f} bits, "
        f"{report.bytes_after / 1e6:.1f} MB, {share:.2f} of {report.bytes_before / 1e6:.1f} MB"
    )
