"""Seconds and peak memory of compiling, zipping and reading back a full-size SD 1.5 UNet.

python benchmarks/full_size.py FOLDER         writes FOLDER/unet.mlpackage
python benchmarks/bench_compile.py FOLDER     measures with it
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from diffusion_convert.compile import compile_package
from diffusion_runtime import zips
from diffusion_runtime.mil.package import open_package

PACKAGE = "unet.mlpackage"


def timed(name: str, work: Callable[[], object]) -> None:
    """Print wall and processor seconds of ``work``; on a shared machine the latter tell more."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    print(f"{name}: {time.perf_counter() - wall:.1f} s ({time.process_time() - processor:.1f} s of processor)")


def main(folder: Path) -> None:
    if not (folder / PACKAGE).exists():
        sys.exit(f"{folder / PACKAGE} is missing: make it with `python benchmarks/full_size.py {folder}`")
    compiled = folder / "compiled"
    timed("compile", lambda: compile_package(folder / PACKAGE, compiled, "Unet"))
    unit = 1 if sys.platform == "darwin" else 1024
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB")
    timed("zip", lambda: zips.pack(compiled, folder / "unet_compiled.zip"))
    timed("read back", lambda: open_package(compiled / "Unet.mlmodelc"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
