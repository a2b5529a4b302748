"""Seconds and peak memory of compiling, zipping and reading back a full-size SD 1.5 UNet, and a program of as many
operations as the largest UNet has (9,160), for which there is a bound.

    python benchmarks/full_size.py FOLDER         writes FOLDER/unet.mlpackage
    python benchmarks/bench_compile.py FOLDER     measures with it
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import command_line
from diffusion_convert.compile import compile_package
from diffusion_runtime import zips
from diffusion_runtime.mil.package import open_package, write_package
from diffusion_runtime.mil.program import Operation, Variable
from diffusion_runtime.processes import peak_memory
from small_bundle import ints, small_model

PACKAGE = "unet.mlpackage"
OPERATIONS, MAX_SECONDS = 10_000, 15.0


def timed(name: str, work: Callable[[], object]) -> None:
    """Print wall and processor seconds of ``work``; on a shared machine the latter tell more."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    print(f"{name}: {time.perf_counter() - wall:.1f} s ({time.process_time() - processor:.1f} s of processor)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if not (folder / PACKAGE).exists():
        sys.exit(f"{folder / PACKAGE} is missing: make it with `python benchmarks/full_size.py {folder}`")
    compiled = folder / "compiled"
    timed("compile", lambda: compile_package(folder / PACKAGE, compiled, "Unet"))
    print(f"peak memory: {peak_memory() / 1e9:.2f} GB")
    timed("zip", lambda: zips.pack(compiled, folder / "unet_compiled.zip"))
    timed("read back", lambda: open_package(compiled / "Unet.mlmodelc"))
    many_operations(folder)


def many_operations(folder: Path) -> None:
    """Exits with a message where compiling and reading back takes longer than `MAX_SECONDS` of the processor."""
    model, _ = small_model("unet", einsum=False)
    function = model.program.functions["main"]
    previous, shape, operations = function.inputs[0].name, function.inputs[0].type, []
    for number in range(OPERATIONS // 2):
        axes = ints(0, 1, 2, 3)
        operations.append(Operation("const", {}, (Variable(f"axes_{number}", axes.type),), {"val": axes}))
        inputs = {"perm": (f"axes_{number}",), "x": (previous,)}
        previous = f"turned_{number}"
        operations.append(Operation("transpose", inputs, (Variable(previous, shape),)))
    block = replace(function.block, operations=tuple(operations), outputs=(previous,))
    program = replace(model.program, functions={"main": replace(function, blocks={"CoreML6": block})})
    write_package(replace(model, program=program), folder / "many.mlpackage")
    start = time.process_time()
    compiled = compile_package(folder / "many.mlpackage", folder).path
    read = open_package(compiled).model
    seconds = time.process_time() - start
    print(f"{OPERATIONS} operations compiled and read back: {seconds:.1f} s of processor")
    if read.program.functions["main"].block != block or seconds > MAX_SECONDS:
        sys.exit(f"expected the same program within {MAX_SECONDS:.0f} s")


if __name__ == "__main__":
    command_line.run(main)
