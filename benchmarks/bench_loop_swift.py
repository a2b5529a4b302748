"""Time per step of everything that is not a model call in the Swift package, at 512x512 with guidance, in a release
build; and Python's beside it, in the same run.

    python benchmarks/bench_loop_swift.py

prints one JSON object, milliseconds per step. Ends with status 1 where one of `LIMITED` takes longer than `MAX_MS`.
Swift's figures include what Python leaves to Core ML's binding: inputs to float16, outputs to float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bench_loop
import command_line

PACKAGE = Path(__file__).resolve().parents[1] / "swift_bridge"
# A scratch folder of its own: with testing enabled, everything is built in another way.
COMMAND = (
    *("swift", "test", "-c", "release", "-Xswiftc", "-enable-testing", "--scratch-path", ".build/bench"),
    *("--filter", "loopBench"),
)
LINE = re.compile(r"^loop: (.+) ([0-9.e-]+)$", re.MULTILINE)
LIMITED = ("ddim", "pndm", "euler")
MAX_MS = 0.3


def measure() -> dict[str, float]:
    environment = {**os.environ, "BRIDGE_BENCH": "1"}
    done = subprocess.run(COMMAND, cwd=PACKAGE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-3000:])
    return {name: round(float(milliseconds), 3) for name, milliseconds in LINE.findall(done.stdout + done.stderr)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if shutil.which("swift") is None:
        print("no `swift` on PATH: the Swift package is not measured")
        return
    swift, python = measure(), bench_loop.measure()
    found = {name: {"swift_ms": swift[name], "python_ms": python[name]["ours_ms"]} for name in bench_loop.NAMES}
    print(json.dumps({"swift loop": found}, indent=2))
    if slow := [name for name in LIMITED if swift[name] > MAX_MS]:
        sys.exit(f"more than {MAX_MS} ms for a step: {', '.join(slow)}")


if __name__ == "__main__":
    command_line.run(main)
