"""Palettization of a full-size SD 1.5 UNet, against coremltools' palettize_weights on the same package in one run.

    python benchmarks/bench_palettize.py [--package PACKAGE] [--bits 6] [--folder FOLDER]

prints one JSON object: seconds, CPU seconds and peak memory of each (a process each), their ratios, the size
against float16, and the largest ratio of our squared error to coremltools' over all weights. Ends with status 1
where a bound of `LIMITS` is missed. Takes about ten minutes, 5 GB of disk and 4 GB of memory, nearly all of it
coremltools'.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import command_line

LIMITS: Mapping[str, float] = {
    "speedup": 10,
    "memory_share": 0.5,
    "size_share": 0.40,
    "worst_error_ratio": 1 + 1e-9,
}
"""At least ten times faster; at most the rest."""

_SUFFIX = "_palettized"
_CHUNK = 1 << 20


def ours(source: Path, output: Path, bits: int) -> None:
    from diffusion_convert.palettize.palettize_options import PalettizeOptions
    from diffusion_convert.palettize.palettize_package import palettize_package

    palettize_package(source, output, PalettizeOptions(bits))


def theirs(source: Path, output: Path, bits: int) -> None:
    from diffusion_runtime.coremltools_import import import_coremltools

    ct = import_coremltools()
    optimize = import_coremltools("optimize").coreml
    operation = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=2048)
    model = ct.models.MLModel(str(source), skip_model_load=True)
    optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=operation)).save(str(output))


WAYS = {"ours": ours, "coremltools": theirs}


def measured(way: str, source: Path, output: Path, bits: int) -> dict[str, float]:
    """Seconds, CPU seconds and peak resident memory (GB) of one way in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--way", way, "--package", str(source), "--output", str(output)]
    run = subprocess.run([*command, "--bits", str(bits)], check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def run_one(way: str, source: Path, output: Path, bits: int) -> None:
    began = time.perf_counter()
    WAYS[way](source, output, bits)
    seconds = time.perf_counter() - began
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1e9 if sys.platform == "darwin" else 1e6
    figures = {
        "seconds": seconds,
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "peak_gb": sum(usage.ru_maxrss for usage in usages) / unit,
    }
    print(json.dumps(figures))


def squared_errors(source: Path, palettized: Path) -> dict[str, float]:
    """By weight: the squared error of what the torch backend's reader decompresses."""
    from diffusion_convert.palettize.palettize_package import stored_array
    from diffusion_convert.palettize.select import palettizable
    from diffusion_runtime.mil.package import open_package
    from diffusion_runtime.mil.packing import unpack
    from diffusion_runtime.mil.program import operations

    original = open_package(source)
    weights = palettizable(original)
    package = open_package(palettized)
    errors = {}
    for operation in operations(package.model.program.functions["main"].block):
        if operation.type != "constexpr_lut_to_dense":
            continue
        name = operation.outputs[0].name.removesuffix(_SUFFIX)
        lut = stored_array(package, operation.attributes["lut"]).astype(np.float64)
        packed = stored_array(package, operation.attributes["indices"])
        bits = int(np.log2(lut.size))
        indices = packed if bits == 8 else unpack(packed, bits, weights[name].size)
        errors[name] = squared_error(stored_array(original, weights[name].value).reshape(-1), lut, indices)
    return errors


def squared_error(weight: np.ndarray, lut: np.ndarray, indices: np.ndarray) -> float:
    """In float64, exactly enough to compare what differs in the seventh digit."""
    starts = range(0, weight.size, _CHUNK)
    parts = ((weight[start : start + _CHUNK], indices[start : start + _CHUNK]) for start in starts)
    return sum(float(np.sum((one.astype(np.float64) - lut[index]) ** 2)) for one, index in parts)


def compare(source: Path, folder: Path, bits: int) -> dict[str, object]:
    outputs = {way: folder / f"{way}-{bits}.mlpackage" for way in WAYS}
    figures = {way: measured(way, source, output, bits) for way, output in outputs.items()}
    errors = {way: squared_errors(source, output) for way, output in outputs.items()}
    ratios = {name: errors["ours"][name] / errors["coremltools"][name] for name in errors["coremltools"]}
    weights = Path("Data/com.apple.CoreML/weights/weight.bin")
    size = (outputs["ours"] / weights).stat().st_size / (source / weights).stat().st_size
    return {
        **figures,
        "speedup": figures["coremltools"]["seconds"] / figures["ours"]["seconds"],
        "cpu_speedup": figures["coremltools"]["cpu_seconds"] / figures["ours"]["cpu_seconds"],
        "memory_share": figures["ours"]["peak_gb"] / figures["coremltools"]["peak_gb"],
        "size_share": size,
        "weights": len(ratios),
        "worst_error_ratio": max(ratios.values()),
        "mean_error_ratio": float(np.mean(list(ratios.values()))),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--package", type=command_line.package, help="default: FOLDER/unet.mlpackage, made where it is missing"
    )
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    parser.add_argument("--bits", type=int, default=6, choices=(1, 2, 4, 6, 8))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        if arguments.package is None or arguments.output is None:
            parser.error("--way, one side alone, takes --package and --output")
        run_one(arguments.way, arguments.package, arguments.output, arguments.bits)
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.package
    if source is None:
        program = Path(__file__).with_name("full_size.py")
        subprocess.run([sys.executable, str(program), str(arguments.folder)], check=True)
        source = arguments.folder / "unet.mlpackage"
    found = compare(source, arguments.folder, arguments.bits)
    print(json.dumps(found, indent=2))
    missed = [name for name, limit in LIMITS.items() if (found[name] < limit) == (name == "speedup")]  # type: ignore[operator]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    command_line.run(main)
