"""`coreml-sd serve` at work: eight clients for ten minutes, then single requests beside the bare pipeline.

    python benchmarks/bench_serve.py [--folder bench-out/serve] [--seconds 600] [--clients 8] [--rounds 200]

serves the shapes checkpoint and prints a JSON object: answers by status, pictures that were not the one that the
pipeline makes for the same prompt and seed, memory of the server and its worker after the first minute and at the
end, pictures per second beside the bare pipeline, milliseconds beyond it. Ends with status 1 where an answer was
lost, wrong or an error, memory grew by more than 10 %, or the median request takes `MAX_MS` longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # where this is a program

import httpx2 as httpx  # noqa: E402
from PIL import Image  # noqa: E402

import command_line  # noqa: E402
from serving import Served, decoded, serving  # noqa: E402
from shapes_models import packages  # noqa: E402

if TYPE_CHECKING:
    from diffusion_runtime.pipeline import Pipeline

STEPS, SCALE = 2, 7.5
PROMPTS = ("a large red circle on a white background", "a small blue square on a yellow background")
SEEDS = range(8)
MAX_MS = 10.0
MAX_GROWTH = 1.10

Key = tuple[str, int]


def bare(pipeline: Pipeline, key: Key) -> Image.Image:
    prompt, seed = key
    image: Image.Image = pipeline(prompt, num_inference_steps=STEPS, guidance_scale=SCALE, seed=seed).images[0]
    return image


def expected(pipeline: Pipeline) -> dict[Key, bytes]:
    """The pixels of every picture that is asked for."""
    return {key: bare(pipeline, key).tobytes() for key in itertools.product(PROMPTS, SEEDS)}


def request(client: httpx.Client, key: Key) -> httpx.Response:
    prompt, seed = key
    body = {"prompt": prompt, "seed": seed, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    return client.post("/v1/images/generations", json=body)


def picture(answer: httpx.Response) -> bytes:
    return decoded(answer.json()["data"][0]["b64_json"]).tobytes()


def children(pid: int) -> list[int]:
    told = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return list(map(int, told.stdout.split()))


def memory_mb(pid: int) -> float:
    """Of a process and its children, as the system counts what is in memory."""
    processes = ",".join(map(str, [pid, *children(pid)]))
    told = subprocess.run(["ps", "-o", "rss=", "-p", processes], capture_output=True, text=True, check=True)
    return sum(map(int, told.stdout.split())) / 1024


@dataclass(slots=True)
class Load:
    """What clients saw: answers by status (0: none came), wrong pictures; the server's count of pictures, and its
    memory at the end."""

    statuses: dict[int, int] = field(default_factory=dict)
    wrong: int = 0
    served: int = 0
    seconds: float = 0.0
    memory_mb: float = 0.0

    def faults(self) -> list[str]:
        found = []
        if set(self.statuses) != {200}:
            found.append(f"statuses {self.statuses}: expected 200 alone")
        if self.wrong:
            found.append(f"{self.wrong} pictures are of another request")
        if self.served != self.statuses.get(200):
            found.append(f"{self.served} pictures were made for {self.statuses.get(200)} answers")
        return found


def press(one: Served, pictures: Mapping[Key, bytes], goes_on: Callable[[int], bool], clients: int = 8) -> Load:
    """Clients that ask, each as soon as it was answered, while ``goes_on(requests so far)``."""
    load, lock, begun = Load(), threading.Lock(), time.monotonic()
    keys = itertools.takewhile(lambda asked: goes_on(asked[0]), enumerate(itertools.cycle(pictures)))
    before = one.metric("pictures_total")

    def ask() -> None:
        with httpx.Client(base_url=one.url, timeout=120, trust_env=False) as client:
            while True:
                with lock:
                    _, key = next(keys, (0, None))
                if key is None:
                    return
                try:
                    answer = request(client, key)
                    status = answer.status_code
                    is_right = status == 200 and picture(answer) == pictures[key]
                except httpx.TransportError:
                    status, is_right = 0, False
                with lock:
                    load.statuses[status] = load.statuses.get(status, 0) + 1
                    load.wrong += status == 200 and not is_right

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds, load.memory_mb = time.monotonic() - begun, memory_mb(one.process.pid)
    load.served = round(one.metric("pictures_total") - before)
    return load


def lasting(seconds: float) -> Callable[[int], bool]:
    """For `press`: from now on, for that long."""
    end = time.monotonic() + seconds
    return lambda _: time.monotonic() < end


def processor_seconds(pids: Sequence[int]) -> float:
    """That processes have used so far. NaN without /proc."""
    try:
        texts = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    except OSError:
        return math.nan
    return sum(int(fields[11]) + int(fields[12]) for fields in texts) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds of the bare pipeline, and of a request beyond it: the median round, the best of each, and the
    processor time of client, server and worker, which other work on the machine changes little."""

    pipeline_ms: float
    median_ms: float
    best_ms: float
    processor_ms: float


def overhead(one: Served, pipeline: Pipeline, keys: Sequence[Key], rounds: int) -> Overhead:
    """By turns, so that other work on the machine disturbs both alike."""
    theirs = [one.process.pid, *children(one.process.pid)]
    bare(pipeline, keys[0])  # the first call loads and compiles
    request(one.client, keys[0])
    pairs, own, whole, before = [], 0.0, 0.0, processor_seconds(theirs)
    for key in itertools.islice(itertools.cycle(keys), rounds):
        begun, used = time.perf_counter(), time.process_time()
        bare(pipeline, key)
        between, middle = time.perf_counter(), time.process_time()
        request(one.client, key)
        pairs.append((between - begun, time.perf_counter() - between))
        own, whole = own + middle - used, whole + time.process_time() - middle
    whole += processor_seconds(theirs) - before
    bares, requests = zip(*pairs, strict=True)
    return Overhead(
        pipeline_ms=1000 * statistics.median(bares),
        median_ms=1000 * statistics.median(second - first for first, second in pairs),
        best_ms=1000 * (min(requests) - min(bares)),
        processor_ms=1000 * (whole - own) / rounds,
    )


def main() -> None:
    import torch

    from diffusion_runtime.loading import load_pipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-out") / "serve")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=command_line.positive, default=8)
    parser.add_argument("--rounds", type=command_line.positive, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = packages(options.folder / "models")
    pipeline = load_pipeline(models, "torch")
    pictures = expected(pipeline)
    with serving(options.folder / "log.txt", f"shapes={models}", "--backend", "torch") as one:
        early = min(60.0, options.seconds / 2)
        loads = [
            press(one, pictures, lasting(seconds), options.clients) for seconds in (early, options.seconds - early)
        ]
        beyond = overhead(one, pipeline, list(pictures), options.rounds)
    rate = sum(load.served for load in loads) / sum(load.seconds for load in loads)
    rates = {"served_per_second": rate, "bare_per_second": 1000 / beyond.pipeline_ms}
    print(json.dumps({"loads": list(map(asdict, loads)), "overhead": asdict(beyond), **rates}, indent=2))
    first, last = (load.memory_mb for load in loads)
    faults = [fault for load in loads for fault in load.faults()]
    if last > MAX_GROWTH * first:
        faults.append(f"{last:.0f} MB at the end, {first:.0f} MB after {early:.0f} s")
    if beyond.median_ms > MAX_MS:
        faults.append(f"a request takes {beyond.median_ms:.1f} ms longer than the pipeline, at most {MAX_MS:g}")
    if faults:
        sys.exit("; ".join(faults))


if __name__ == "__main__":
    command_line.run(main)
