"""Start-up on the shapes checkpoint of this repository: seconds of whole commands, each in a process of its own.

    python benchmarks/bench_start.py [--folder DIR]

``generate`` draws in one step, decoding, safety checker and saving included. Best of three: what is measured is the
program, not the disk.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE.parent / "tests" / "checkpoints" / "shapes"
RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    folder = parser.parse_args().folder / "start"
    models = folder / "models"
    command = [sys.executable, "-m", "coreml_sd"]
    if not models.exists():
        options = ["--output", str(models), "--attention", "original", "--no-zip"]
        subprocess.run([*command, "convert", str(CHECKPOINT), *options], check=True, capture_output=True)
    draw = ["generate", str(models), "--prompt", "a red circle", "--steps", "1", "--seed", "1"]
    draw += ["--output", str(folder / "picture.png")]
    for name, arguments in {
        "--help": ["--help"],
        "inspect": ["inspect", str(models / "original" / "compiled")],
        "generate, one step": draw,
    }.items():
        runs = [timed([*command, *arguments]) for _ in range(RUNS)]
        wall, processor = (min(values) for values in zip(*runs, strict=True))
        print(f"{name:32}{wall:7.2f} s {processor:7.2f} s processor", flush=True)


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
