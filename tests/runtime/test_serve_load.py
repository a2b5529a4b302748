"""Eight clients at once: nothing is lost, mixed up or refused, and memory stays. The number of pictures shows that,
not their size or the time: `make bench` presses the shapes checkpoint for ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench_serve
from diffusion_runtime.loading import load_pipeline
from serving import serving

BEGINNING, PICTURES = 50, 500
MAX_GROWTH_MB = 4.0
"""8 kB a picture: less than the pixels of one."""


@pytest.mark.slow
def test_eight_clients_lose_nothing_and_memory_stays(toy_folder: Path, tmp_path: Path) -> None:
    pictures = bench_serve.expected(load_pipeline(toy_folder, "torch"))
    assert len(set(pictures.values())) == len(pictures), "a picture that is another request's must be seen"
    with serving(tmp_path / "log.txt", f"toy={toy_folder}") as served:
        loads = [
            bench_serve.press(served, pictures, lambda asked, count=count: asked < count)  # type: ignore[misc]
            for count in (BEGINNING, PICTURES)
        ]
        assert served.metric("worker_deaths_total") == 0
    assert [load.faults() for load in loads] == [[], []]
    assert [load.served for load in loads] == [BEGINNING, PICTURES]
    assert loads[1].memory_mb - loads[0].memory_mb < MAX_GROWTH_MB
