"""Damaged inputs through the real commands: no traceback, no hang, nothing outside, nothing executed.

    python -m fuzz.inputs --cases 2000                   cases 0 to 1999
    python -m fuzz.inputs --case 317 --keep /tmp/case    one case, its files kept in a folder

A case is its number: the same number damages the same file in the same way. Ends with status 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuzz import seeds
from fuzz.targets import TARGETS

BATCH = 250
"""Cases of one process: what one of them leaves in memory must not hide in thousands."""
WORKER = "from fuzz.worker import main; main()"
MAX_SILENCE_SECONDS = 180.0
"""Of a worker, by the wall clock: longer, and it waits for something that does not come."""


def run(
    root: Path,
    first: int,
    last: int,
    batch: int = BATCH,
    ways: Sequence[str] = (),
    python: str | Path = sys.executable,
) -> Iterator[dict[str, Any]]:
    """The outcome of every case, in order. ``root`` holds the seeds, and the folders of cases that failed after.
    ``ways``: what stands in the files' place, of `worker.INSTEAD`, each for as many cases as there are targets.
    ``python`` runs the worker."""
    if not (root / "seeds").is_dir():
        seeds.write(root / "seeds")
    at = first
    while at < last:
        end = min(at + batch, last)
        command = [str(python), "-c", WORKER, str(root), str(at), str(end), *ways]
        for result in _worker(command):
            yield result
            at = result["case"] + 1


def _worker(command: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Outcomes until the process ends; one that died or fell silent has its last case's outcome made here."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )
    assert process.stdout is not None and process.stderr is not None
    begun, ready, selector = None, False, selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    silent = False
    while True:
        silent = not selector.select(MAX_SILENCE_SECONDS)
        line = "" if silent else process.stdout.readline()
        if not line:
            break
        told = json.loads(line)
        begun, ready = told.get("begins", begun), True
        if "case" in told:
            begun = None
            yield told
    process.kill()
    said = process.communicate()[1]
    if begun is not None:
        slow = process.returncode == -signal.SIGXCPU
        what = "hang: deaf to its timer" if slow else f"crash: status {process.returncode}"
        what = f"hang: silent for {MAX_SILENCE_SECONDS:.0f} s" if silent else what
        target = list(TARGETS)[begun % len(TARGETS)]
        yield {
            "case": begun,
            "target": target,
            "command": [],
            "problems": [what],
            "error": said[-2000:],
            "said": "",
        }
    elif not ready:
        raise RuntimeError(f"the worker cannot start: {said[-2000:]}")


def _environment() -> dict[str, str]:
    tests = str(Path(__file__).resolve().parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def report(results: list[dict[str, Any]], seconds: float) -> int:
    """Print what failed and a summary; the number of failed cases."""
    failed = [result for result in results if result["problems"]]
    kinds = Counter(problem.partition(":")[0] for result in failed for problem in result["problems"])
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    codes = Counter(result.get("code", -1) for result in results)
    print(
        f"{len(results)} damaged inputs in {seconds:.0f} s: {codes[0]} accepted, {codes[1] + codes[2]} refused, "
        f"{len(failed)} failed{': ' if kinds else ''}{shown}"
    )
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="only this one; its whole outcome is printed")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave what failed there")
    arguments = parser.parse_args()
    first = arguments.first if arguments.case is None else arguments.case
    last = first + (arguments.cases if arguments.case is None else 1)
    started, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="coreml-sd-fuzz-") as temporary:
        root = (arguments.keep or Path(temporary)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        for result in run(root, first, last):
            results.append(result)
            if result["problems"]:
                print(f"case {result['case']} ({result['target']}): {' '.join(result['command'])}")
                print(*(f"    {problem}" for problem in result["problems"]), sep="\n", flush=True)
            if arguments.case is not None:
                print(result["error"] or result["said"], end="")
    return 1 if report(results, time.perf_counter() - started) else 0


if __name__ == "__main__":
    raise SystemExit(main())
