"""From a float16 package to a palettized one that has been checked: the one way for `convert` and `palettize`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_convert.palettize.outputs import Samples, compare_outputs, require_outputs
from diffusion_convert.palettize.package import Progress, palettize_package
from diffusion_convert.palettize.plan import Plan, Report
from diffusion_convert.verification.bounds import MIN_PSNR_DB


@dataclass(frozen=True, slots=True)
class Checked:
    """``psnr_db`` by output, against the float16 package; empty where outputs were not compared."""

    report: Report
    psnr_db: Mapping[str, float]


def palettize_checked(
    source: Path,
    output: Path,
    plan: Plan,
    *,
    samples: Samples | None = None,
    bounds: Mapping[int, float] = MIN_PSNR_DB,
    compare: bool = True,
    progress: Progress | None = None,
) -> Checked:
    """`palettize_package`, and then run both packages with the torch backend on ``samples`` (None: seeded ones by
    the inputs' names). ``output`` appears only where every output keeps the bound of its bit width.

    Raises what `palettize_package` does, UnsupportedError where the backend does not cover the program, and
    VerificationError below the bound.
    """
    unchecked = output.with_name(f".{output.stem}.unchecked.mlpackage")
    try:
        report = palettize_package(source, unchecked, plan, progress)
        psnr: Mapping[str, float] = {}
        if compare:
            psnr = compare_outputs(source, unchecked, samples)
            require_outputs(output, psnr, report.average_bits, bounds)
        _replace(unchecked, output)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return Checked(report, psnr)


def _replace(finished: Path, output: Path) -> None:
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        if output.exists():
            output.rename(replaced)
        finished.rename(output)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)
