"""`make bench`: every measurement at full size, one after the other, each in a process of its own.

    python benchmarks/run.py [NAME ...]      all, or only those named

Needs about 25 GB of disk (bench-out/, removed by `make clean`) and 16 GB of memory, most of it coremltools'
and diffusers' own, against which we are measured. Ends with status 1 if a measurement failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from diffusion_runtime import memory

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "bench-out"
PACKAGE = OUTPUT / "unet.mlpackage"
LOAD_SECONDS = os.environ.get("LOAD_SECONDS", "600")
BENCHES: dict[str, tuple[tuple[str, ...], ...]] = {
    "loop": (("bench_loop.py",),),
    "swift": (("bench_loop_swift.py",),),
    "unet": (("bench_convert.py", "--folder", str(OUTPUT)),),
    "sizes": (
        (
            *("bench_convert.py", "--folder", str(OUTPUT), "--component", "unet", "--attention", "original"),
            *("--nbits", "6", "--size", "512x512", "--size", "768x512"),
        ),
    ),
    "checkpoint": (("bench_convert.py", "--folder", str(OUTPUT), "--whole"),),
    "sdxl": (("bench_convert.py", "--folder", str(OUTPUT), "--whole", "--family", "sdxl", "--limit-gb", "8"),),
    "sdxl-6bit": (
        (
            *("bench_convert.py", "--folder", str(OUTPUT), "--whole", "--family", "sdxl", "--limit-gb", "8"),
            *("--nbits", "6", "--compiled", "--attention", "original", "--attention", "split_einsum_v2"),
        ),
    ),
    "sdxl-depth": (
        (
            *("bench_convert.py", "--folder", str(OUTPUT), "--family", "sdxl", "--no-verify"),
            *("--attention", "split_einsum_v2"),
        ),
    ),
    "compile": (("bench_compile.py", str(OUTPUT)),),
    "palettize": (("bench_palettize.py", "--package", str(PACKAGE), "--folder", str(OUTPUT)),),
    "mix": (("bench_mix.py", "--package", str(PACKAGE)),),
    "demo": (("../tests/demo.py",),),
    "start": (("bench_start.py", "--folder", str(OUTPUT)),),
    "quality": (("bench_palettized_quality.py", "--folder", str(OUTPUT / "quality")),),
    "steps": (("bench_few_steps.py", "--folder", str(OUTPUT / "few-steps")),),
    "torch": (("bench_torch.py", str(OUTPUT)),),
    "serve": (("bench_serve.py", "--folder", str(OUTPUT / "serve"), "--seconds", LOAD_SECONDS),),
    "batch": (("bench_batch.py", "--folder", str(OUTPUT / "batch")),),
}
NEED_PACKAGE = ("compile", "palettize", "mix", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)} (default: all)")
    chosen = parser.parse_args().names or list(BENCHES)
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        parser.error(f"unknown measurement {unknown[0]!r}: expected one of {', '.join(BENCHES)}")
    OUTPUT.mkdir(exist_ok=True)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command sets it; for both sides of a comparison
    memory.keep_freed()
    commands = [command for name in chosen for command in BENCHES[name]]
    if any(name in NEED_PACKAGE for name in chosen) and not PACKAGE.exists():
        commands.insert(0, ("full_size.py", str(OUTPUT)))
    failed = []
    for script, *arguments in commands:
        print(f"\n== {script} {' '.join(arguments)}", flush=True)
        began = time.perf_counter()
        if subprocess.run([sys.executable, str(HERE / script), *arguments], check=False).returncode:
            failed.append(script)
        print(f"== {time.perf_counter() - began:.1f} s in all", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
