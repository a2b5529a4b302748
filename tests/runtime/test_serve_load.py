"""Eight clients at once: nothing is lost, mixed up or refused, memory stays, and little is added to the pipeline's
own time. `make test LOAD_SECONDS=10` makes it shorter; `make bench` takes ten minutes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import bench_serve
from diffusion_runtime.loading import load_pipeline
from diffusion_runtime.pipeline import Pipeline
from serving import Served, serving

SECONDS = float(os.environ.get("LOAD_SECONDS", "120"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline(shapes_folder: Path) -> Pipeline:
    return load_pipeline(shapes_folder, "torch")


@pytest.fixture(scope="module")
def served(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "log.txt", f"shapes={shapes_folder}") as one:
        yield one


def test_eight_clients_lose_nothing_and_memory_stays(served: Served, pipeline: Pipeline) -> None:
    load = bench_serve.press(served, bench_serve.expected(pipeline), SECONDS)
    assert load.faults() == [] and load.served > 8
    assert served.metric("worker_deaths_total") == 0
