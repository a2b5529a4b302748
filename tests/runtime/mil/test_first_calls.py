"""A program's code is generated when it is first called, by however many threads at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from diffusion_runtime.mil.lower import lower
from diffusion_runtime.mil.package import open_package


def test_threads_that_call_a_program_first_generate_its_code_one_by_one(
    save_program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch changes the graph's nodes while it does so."""
    generate, begun, overlaps = fx.Graph.python_code, [], []

    def slowly(graph: fx.Graph, *given: Any, **named: Any) -> Any:
        begun.append(graph)
        overlaps.append(len(begun))
        time.sleep(0.05)
        made = generate(graph, *given, **named)
        begun.remove(graph)
        return made

    monkeypatch.setattr(fx.Graph, "python_code", slowly)
    module = lower(open_package(save_program(lambda mb, x: mb.add(x=mb.relu(x=x), y=1.0), x=(2, 3))))
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(module, torch.zeros(2, 3)) for _ in range(3)]
    for call in calls:
        (found,) = call.result().values()
        assert torch.equal(found, torch.ones(2, 3))
    assert set(overlaps) == {1}
