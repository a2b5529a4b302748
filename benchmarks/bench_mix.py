"""`--target-bits` for a full-size SD 1.5 UNet: bits chosen by weight, palettized, compared with the 16-bit package.

    python benchmarks/bench_mix.py --package PACKAGE [--bits 4.5]

prints seconds, processor seconds and the most memory in use of each phase.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import command_line
from bench_convert import processor_seconds, take_peak_gb
from diffusion_convert.palettize.checked import palettize_checked
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.recipe import mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=command_line.package, required=True)
    parser.add_argument("--bits", type=float, default=4.5)
    arguments = parser.parse_args()
    peaks = []

    def tell(what: str, began: float, processor: float) -> None:
        peaks.append(take_peak_gb())
        seconds, used = time.perf_counter() - began, processor_seconds() - processor
        print(f"{what:32}{seconds:8.1f} s {used:8.1f} s processor {peaks[-1]:6.2f} GB peak", flush=True)

    started = time.perf_counter(), processor_seconds()
    mixed = mix(arguments.package, PalettizeOptions(), arguments.bits)
    tell("choose bits", *started)
    begun = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory(dir=arguments.package.parent) as folder:
        made = palettize_checked(arguments.package, Path(folder) / "mixed.mlpackage", mixed.options)
    tell("palettize, outputs compared", *begun)
    tell("all", *started)
    print(f"{made.report.average_bits:.2f} bits on average, {made.psnr_db}; {max(peaks):.2f} GB at most")


if __name__ == "__main__":
    command_line.run(main)
