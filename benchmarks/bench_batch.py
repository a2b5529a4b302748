"""How `coreml-sd batch` grows with workers, as processes of this machine and as actors of Ray.

    python benchmarks/bench_batch.py [--folder bench-out/batch] [--rows 120] [--steps 25] [--workers 1 2]

draws rows of the shapes checkpoint and prints a Markdown table. Workers may share cores with other work, so beside
pictures per second stands what does not depend on that: the share of the time in which workers drew, and the
processor time that the first process takes for a row, which limits how many workers it can keep busy.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
from diffusion_runtime.batch.local import LocalWorkers
from diffusion_runtime.batch.on_ray import RayWorkers, connect
from diffusion_runtime.batch.places import Folder
from diffusion_runtime.batch.run import Batch, prepare, setups
from shapes_models import packages

PROMPT = "a large red circle on a white background"


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one run, without its start and its end: ``drawing`` is the share of the time in which workers drew,
    ``own_ms`` the first process's processor time for a row."""

    pictures_per_second: float
    seconds: float
    drawing: float
    own_ms: float


def measure(models: Path, folder: Path, rows: int, steps: int, workers: int, ray: Any = None) -> Growth:
    """A batch of ``rows`` on so many workers, with ``ray`` on its actors."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table, place = folder / "prompts.txt", Folder(folder / "out")
    table.write_text(f"{PROMPT}\n" * rows)
    each = setups(str(models), {"backend": "torch"}, str(place.path), 1, workers, None, None)
    several = LocalWorkers(each) if ray is None else RayWorkers(ray, each)
    times, own, drawn = [], [], []
    with place.hold():
        for answer in Batch(prepare(table, place, {"steps": steps}, 1, each), place, several).run():
            if answer.error is not None or answer.seconds is None:
                raise SystemExit(f"row {answer.task.number}: {answer.error}")
            times.append(time.perf_counter())
            own.append(time.process_time())
            drawn.append(answer.seconds)
    first, last = 2 * workers, rows - workers  # between these every worker has its models and a row
    wall, count = times[last] - times[first], last - first
    inside = drawn[first + 1 : last + 1]
    return Growth(
        pictures_per_second=count / wall,
        seconds=sum(inside) / count,
        drawing=sum(inside) / (wall * workers),
        own_ms=1000 * (own[last] - own[first]) / count,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-out") / "batch")
    parser.add_argument("--rows", type=command_line.positive, default=120)
    parser.add_argument("--steps", type=command_line.positive, default=25)
    parser.add_argument("--workers", type=command_line.positive, nargs="+", default=[1, 2])
    options = parser.parse_args()
    models = packages(options.folder / "models")
    ray = connect("local")
    print("| workers | pictures per second | seconds per picture | workers draw | first process, ms per row |")
    print("|---|---|---|---|---|")
    for name, cluster in (("processes", None), ("Ray's", ray)):
        for workers in options.workers:
            found = measure(models, options.folder / "work", options.rows, options.steps, workers, cluster)
            print(
                f"| {workers} {name} | {found.pictures_per_second:.2f} | {found.seconds:.2f} "
                f"| {100 * found.drawing:.0f} % | {found.own_ms:.1f} |",
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    command_line.run(main)
