"""Start-up on the shapes checkpoint of this repository: seconds of whole commands, each in a process of its own.

    python benchmarks/bench_start.py [--folder DIR]

``generate`` draws in one step. "until the first step" is the time from the start of its process until that step is
done: the UNet is loaded and has run once, with the prompt encoded; the whole command decodes, checks and saves the
picture, too. Best of five, of each column by itself: what is measured is the program, not the disk. As for users,
Python keeps the bytecode of the modules.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import command_line

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE.parent / "tests" / "checkpoints" / "shapes"
RUNS = 5
# The command, with the time told after each step; what it imports for that, the command imports anyway.
WATCHED = """
import sys, time
from coreml_sd import main
from diffusion_runtime.cli import generate

reporter = generate._reporter

def watched(*arguments):
    on_step = reporter(*arguments)
    def told(*step):
        print("step", time.time(), file=sys.stderr)
        on_step(*step)
    return told

generate._reporter = watched
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    folder = parser.parse_args().folder / "start"
    models = folder / "models"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "coreml_sd"]
    if not models.exists():
        options = ["--output", str(models), "--attention", "original", "--no-zip"]
        subprocess.run([*command, "convert", str(CHECKPOINT), *options], check=True, capture_output=True)
    compiled = str(models / "original" / "compiled")
    draw = ["generate", str(models), "--prompt", "a red circle", "--steps", "1", "--seed", "1"]
    draw += ["--output", str(folder / "picture.png")]
    for name, arguments in {
        "--help": ["--help"],
        "convert --help": ["convert", "--help"],
        "inspect": ["inspect", compiled],
        "doctor": ["doctor"],
        "generate, one step": draw,
    }.items():
        wall, processor, peak_gb = best([timed([*command, *arguments]) for _ in range(RUNS)])
        print(f"{name:38}{wall:7.2f} s {processor:7.2f} s processor {peak_gb:6.2f} GB peak", flush=True)
    (until,) = best([(until_first_step(draw),) for _ in range(RUNS)])
    print(f"{'generate, until the first step is done':38}{until:7.2f} s", flush=True)


def best(runs: list[tuple[float, ...]]) -> tuple[float, ...]:
    """The least of each column."""
    return tuple(min(values) for values in zip(*runs, strict=True))


def timed(command: list[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and the most memory (GB) of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    unit = 1e9 if sys.platform == "darwin" else 1e9 / 1024  # macOS counts bytes, Linux KiB
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def until_first_step(arguments: list[str]) -> float:
    """Seconds from the start of a process that draws until its first step is done."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], check=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    said = (line.split() for line in done.stderr.decode().splitlines())
    return next(float(words[1]) for words in said if words[:1] == ["step"]) - began


if __name__ == "__main__":
    command_line.run(main)
