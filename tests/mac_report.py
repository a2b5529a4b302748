"""What only a Mac can tell, for its workflow, and as a dry run anywhere.

    python tests/mac_report.py units FOLDER        a UNet of real depth, each attention, on each compute unit
    python tests/mac_report.py compilers FOLDER    what Apple's compiler makes of each kind of package, and ours

Both write FOLDER/{units,compilers}.json, print a line for each case, and end with 1 where something is wrong:
a unit that computes something else or ends the process, a compiled model that is other than Apple's. `compilers`
leaves what either compiler wrote in FOLDER. With ``--backend torch`` the torch backend stands in for Core ML.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import tiny_checkpoints
from compiled_pairs import compiler_versions, differences
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.chunk import chunk
from diffusion_convert.compile import Compiler, compile_package
from diffusion_convert.compile.coverage import check
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package
from diffusion_convert.verification.compare import psnr_db
from diffusion_runtime.backends import ComputeUnits, load_backend
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import DiffusionError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import Metadata
from diffusion_runtime.performance import MIN_PSNR_DB

UNITS = (ComputeUnits.CPU_AND_GPU, ComputeUnits.CPU_AND_NE, ComputeUnits.CPU_ONLY)
REAL_DEPTH: Mapping[str, Any] = {
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "sample_size": 32,
}
"""Over the tiny SD 1 checkpoint's: SD 1.5's blocks at tiny widths. That attention aborts on a GPU was seen in deep
programs only."""
TARGETS = ("macOS13", "macOS15")
CHILD_SECONDS = 900


# --- compute units


def deep_unet(folder: Path, attention: AttentionKind, target: str) -> Path:
    """``folder/{attention}-{target}.mlpackage``: a UNet of SD 1.5's depth."""
    source, path = folder / "deep", folder / f"{attention.value}-{target}.mlpackage"
    if not source.is_dir():
        tiny_checkpoints.build("sd1", source, **REAL_DEPTH)
    size = REAL_DEPTH["sample_size"] * 2 ** (len(tiny_checkpoints.RECIPES["sd1"].vae["block_out_channels"]) - 1)
    options = ExportOptions(attention, Shape(size, size, 2), target)
    export(table()["unet"], open_checkpoint(str(source)), options, path, Metadata())
    return path


def inputs_of(package: Path) -> dict[str, np.ndarray]:
    """Seeded inputs of a UNet."""
    random = np.random.default_rng(0)
    drawn = {
        one.name: random.standard_normal(one.shape).astype(np.float16)
        for one in open_package(package).model.interface.inputs
    }
    return {**drawn, "timestep": np.full_like(drawn["timestep"], 801)}


def compare(package: Path, unit: ComputeUnits, backend: str) -> float:
    """dB of a backend's output on a compute unit against the torch backend's in float32."""
    inputs = inputs_of(package)
    expected = load_backend("torch").load(package, ComputeUnits.CPU_ONLY)(**inputs)
    found = load_backend(backend).load(package, unit)(**inputs)
    return min(psnr_db(expected[name], found[name]) for name in expected)


def in_a_process(command: list[str]) -> tuple[float | None, str]:
    """What a child prints last, as a number, and what is wrong: a GPU driver may end the process."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"did not end within {CHILD_SECONDS} s"
    lines = done.stdout.split()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        return None, f"{how}: {said}"
    value = float(lines[-1])
    return value, "" if value >= MIN_PSNR_DB else f"computes something else: {value:.1f} dB"


def check_units(folder: Path, backend: str) -> Iterator[dict[str, Any]]:
    """One case for each attention, target and compute unit."""
    for target in TARGETS:
        for attention in AttentionKind:
            package = deep_unet(folder, attention, target)
            for unit in UNITS:
                command = [
                    sys.executable,
                    __file__,
                    "one",
                    str(package),
                    "--unit",
                    unit.value,
                    "--backend",
                    backend,
                ]
                found, wrong = in_a_process(command)
                yield {
                    "case": f"{attention.value}, {target}, {unit.value}",
                    "psnr_db": found,
                    "wrong": wrong,
                }


# --- compilers


def packages(folder: Path) -> Iterator[Path]:
    """A package of each kind that this project makes, and one with two functions."""
    source = folder / "sd1"
    if not source.is_dir():
        tiny_checkpoints.build("sd1", source)
    checkpoint = open_checkpoint(str(source))

    def made(component: str, attention: AttentionKind, target: str, name: str, side: int = 64) -> Path:
        path = folder / f"{name}.mlpackage"
        options = ExportOptions(attention, Shape(side, side, 2), target)
        export(table()[component], checkpoint, options, path, Metadata(user_defined={"coreml_sd.case": name}))
        return path

    for target in ("macOS13", "macOS14", "macOS15"):
        for attention in AttentionKind:
            yield made("unet", attention, target, f"unet-{attention.value}-{target}")
    for component in ("text_encoder", "vae_decoder", "vae_encoder", "safety_checker"):
        yield made(component, AttentionKind.ORIGINAL, "macOS13", component)
    whole = folder / "unet-original-macOS13.mlpackage"
    for bits in (4, 6):
        palettize_package(whole, folder / f"unet-{bits}-bits.mlpackage", PalettizeOptions(bits=bits))
        yield folder / f"unet-{bits}-bits.mlpackage"
    halves = (folder / "unet-chunk1.mlpackage", folder / "unet-chunk2.mlpackage")
    chunk(whole, *halves)
    yield from halves
    sizes = [made("unet", AttentionKind.ORIGINAL, "macOS15", f"unet-{side}", side) for side in (64, 128)]
    yield two_functions(sizes, folder / "unet-two-functions.mlpackage")


def two_functions(sources: list[Path], path: Path) -> Path:
    """One package in which each of ``sources`` is a function of its name."""
    utils = import_coremltools("models.utils")
    described = utils.MultiFunctionDescriptor()
    for source in sources:
        described.add_function(
            str(source), src_function_name="main", target_function_name=source.stem.replace("-", "_")
        )
    described.default_function_name = sources[0].stem.replace("-", "_")
    utils.save_multifunction(described, str(path))
    return path


def check_compilers(folder: Path) -> Iterator[dict[str, Any]]:
    """One case for each package: the files that our compiled model has other than Apple's. What ours refuses is
    told, and is not wrong: Apple's compiled form of it is what is to be learned."""
    for package in packages(folder):
        apple = compile_package(package, folder / "apple", compiler=Compiler.XCRUN).path
        try:
            check(open_package(package).model, package)
        except DiffusionError as error:
            yield {"case": package.stem, "refused": str(error), "wrong": ""}
            continue
        try:
            ours = compile_package(package, folder / "ours", versions=compiler_versions(apple)).path
            wrong = ", ".join(differences(ours, apple))
        except DiffusionError as error:
            wrong = f"cannot be compared: {error}"
        yield {"case": package.stem, "wrong": wrong}


# --- the command


def run(name: str, cases: Iterator[dict[str, Any]], folder: Path, show: Callable[[str], object] = print) -> int:
    """Write the report; 1 where a case is wrong."""
    found = []
    for case in cases:
        found.append(case)
        figure = "" if case.get("psnr_db") is None else f"{case['psnr_db']:.1f} dB"
        show(f"{case['case']}: {case['wrong'] or case.get('refused') or figure or 'the same'}")
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(any(case["wrong"] for case in found))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("units", "compilers", "one"))
    parser.add_argument("folder", type=Path, help="for the result; of `one`: the package")
    parser.add_argument("--backend", choices=("coreml", "torch"), default="coreml")
    parser.add_argument("--unit", choices=[unit.value for unit in ComputeUnits], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.what == "one":
        print(compare(given.folder, ComputeUnits(given.unit), given.backend))
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    cases = check_units(given.folder, given.backend) if given.what == "units" else check_compilers(given.folder)
    return run(given.what, cases, given.folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
