"""From a float16 package to a palettized one that has been checked: the one way for `convert` and `palettize`."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_convert.palettize.known import Known
from diffusion_convert.palettize.outputs import (
    Samples,
    lowest_psnr_db,
    outputs_of_both,
    require_outputs,
    require_steady,
)
from diffusion_convert.palettize.palettize_options import PalettizeOptions, Report
from diffusion_convert.palettize.palettize_package import OnWeight, palettize_package
from diffusion_convert.verification.bounds import MIN_PSNR_DB, bound_db
from diffusion_convert.verification.known_runs import KnownRuns
from diffusion_runtime.atomic import unfinished_folder
from diffusion_runtime.mil.functions import function_names
from diffusion_runtime.mil.package import open_package


@dataclass(frozen=True, slots=True)
class Checked:
    """``psnr_db`` by output ("size_768x512: noise_pred" where there are several functions), against the float16
    package; empty where outputs were not compared."""

    report: Report
    psnr_db: Mapping[str, float]


def palettize_checked(
    source: Path,
    output: Path,
    options: PalettizeOptions,
    *,
    samples: Samples | None = None,
    expected: Samples | None = None,
    bounds: Mapping[int, float] = MIN_PSNR_DB,
    compare: bool = True,
    known: Known | None = None,
    runs: KnownRuns | None = None,
    progress: OnWeight | None = None,
) -> Checked:
    """`palettize_package`, and then run both packages with the torch backend on ``samples`` (None: seeded ones by
    the inputs' names), each function of those that have several. ``expected``: what ``source`` makes of
    ``samples``, where it has been run already; ``known`` and ``runs``: palettes that were made, and what was
    computed, of others with the same weights. ``output`` appears only where every output keeps the bound of its
    bit width.

    Raises what `palettize_package` does, UnsupportedError where the backend does not cover the program, and
    VerificationError below the bound, StorageError where another process is writing ``output``.
    """
    with unfinished_folder(output) as unchecked:
        report = palettize_package(source, unchecked, options, progress, known)
        gc.collect()  # or the weights of SDXL's UNet stay mapped beside those of the package that is run now
        psnr: dict[str, float] = {}
        functions = function_names(open_package(source).model) or (None,)
        for function in functions if compare else ():
            first = function is functions[0]  # what is given has the default function's shapes
            drawn, made = (samples, expected) if first else (None, None)
            outputs = outputs_of_both(source, unchecked, drawn, function, made, runs)
            found = lowest_psnr_db(*outputs)
            bound = bound_db(report.average_bits, bounds)
            if any(not value >= bound for value in found.values()):
                require_steady(source, drawn, found, bound, function)
            psnr |= {name if function is None else f"{function}: {name}": value for name, value in found.items()}
        if compare:
            require_outputs(output, psnr, report.average_bits, bounds)
    return Checked(report, psnr)
