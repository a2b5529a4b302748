"""The time of everything that is not a model call."""

from __future__ import annotations

import time

import pytest

import bench_loop

MAX_MS = 0.5  # per step at 512x512; the reference's client takes 0.47 to 0.63


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
def test_a_step_costs_next_to_nothing_beside_the_model(scheduler: str) -> None:
    """By the processor's clock, which other work on the machine hardly disturbs."""
    loop = bench_loop.our_loop(scheduler, steps=50)
    assert bench_loop.milliseconds_per_step(loop, steps=50, rounds=15, clock=time.thread_time) <= MAX_MS
