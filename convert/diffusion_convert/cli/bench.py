"""``coreml-sd bench``: how fast converted models run on this machine, and whether they are right there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.cli import interruption
from diffusion_runtime.cli.options import Backend
from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    from diffusion_runtime.bundle.find import Bundle
    from diffusion_runtime.performance import Measurement, Report

HELP = """
Measure converted models on this machine: load, first call and steady time of
each component, pictures per minute, memory, and whether each computes what
the torch backend computes from the same inputs. Exit code 1: one does not.

On a Mac each component runs on each compute unit, and where macOS tells, the
operations that run on CPU, GPU and Neural Engine are counted. Elsewhere the
torch backend is measured.

Examples:

    coreml-sd bench models

    coreml-sd bench models --compute-units cpu-and-ne,cpu-and-gpu \\
        --report report.json

The report holds no name of a person, a folder or a host. Please attach it to
an issue: figures of many Macs make good defaults.
"""


def bench(
    models: Annotated[Path, typer.Argument(help="A folder of models.", metavar="MODELS", show_default=False)],
    compute_units: Annotated[
        str | None, typer.Option(help="Only these, as in cpu-and-ne,cpu-and-gpu. Default: all.", show_default=False)
    ] = None,
    components: Annotated[
        str | None, typer.Option(help="Only these, as in unet,vae_decoder. Default: all.", show_default=False)
    ] = None,
    backend: Backend = "auto",
    runs: Annotated[int, typer.Option(help="Calls of which the median is the steady time.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Steps of the pictures that are counted per minute.", min=1)] = 20,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare with the torch backend on the same inputs.")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(help="Write all figures to this JSON file.", show_default=False)
    ] = None,
) -> None:
    from diffusion_runtime import performance
    from diffusion_runtime.backends import ComputeUnits, load_backend, resolve
    from diffusion_runtime.bundle.find import find, parse_units

    name = resolve(backend)
    if compute_units is not None and name != "coreml":
        raise InputError("--compute-units are Core ML's: leave them out with the torch backend")
    units = (
        [parse_units(text.strip()) for text in compute_units.split(",")] if compute_units else list(ComputeUnits)
    )
    bundle = find(models, backend=name)
    chosen = _components(bundle, components)
    done: list[Measurement] = []
    for one in performance.measure(
        bundle, chosen, (name, load_backend(name)), units if name == "coreml" else [None], runs, check
    ):
        _say(one)
        done.append(one)
    made = performance.report(bundle, done, steps)
    _show(made)
    if report is not None:
        with unfinished_file(report) as path:
            path.write_text(json.dumps(made.as_json(), indent=2) + "\n", encoding="utf-8")
        typer.echo(f"report: {report}")
    if not all(one.is_right for one in done):
        raise typer.Exit(1)


def _components(bundle: Bundle, text: str | None) -> list[str]:
    known = list(bundle.manifest.components)
    chosen = [part.strip() for part in text.split(",")] if text else known
    if unknown := [part for part in chosen if part not in known]:
        raise InputError(f"--components {unknown[0]}: these models have {', '.join(known)}")
    return chosen


def _say(one: Measurement) -> None:
    """A line as soon as it is known, on the error stream: a run on all units takes minutes."""
    interruption.check()  # else it would be one component's error
    where = one.compute_units or one.backend
    what = one.error or f"{_seconds(one.steady_seconds)} a call"
    typer.echo(f"{one.component} on {where}: {what}", err=True)


def _show(made: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{made.models['family']} {made.models['attention']}, {made.machine['processor']}")
    for column in ("component", "runs on", "load", "first call", "steady", "PSNR", "operations"):
        table.add_column(column)
    for one in made.measurements:
        devices = ", ".join(f"{count} {device}" for device, count in sorted(one.devices.items()))
        table.add_row(
            one.component,
            one.compute_units or one.backend,
            _seconds(one.load_seconds),
            _seconds(one.first_call_seconds),
            _seconds(one.steady_seconds),
            _quality(one),
            devices,
        )
    Console().print(table)
    for where, rate in made.pictures_per_minute.items():
        typer.echo(f"{where}: {rate:.1f} pictures a minute of {made.steps} steps")
    wrong = [
        f"{one.component} on {one.compute_units or one.backend}" for one in made.measurements if not one.is_right
    ]
    if wrong:
        typer.echo(f"wrong or failing: {', '.join(wrong)}; choose other compute units there")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _quality(one: Measurement) -> str:
    if one.error is not None:
        return "failed"
    if one.psnr_db is None:
        return "-"
    return f"{one.psnr_db:.1f} dB" + ("" if one.is_right else " WRONG")
