"""Tracing by shapes: the same graph as tracing by values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export.trace import trace
from diffusion_convert.verification.compare import widened
from diffusion_runtime.families import AttentionKind


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_encoder"])
def test_graph_and_results_are_those_of_ordinary_tracing(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    graph = table()[name].build(checkpoint, AttentionKind.SPLIT_EINSUM, Shape(64, 64, 2))
    for parameter in graph.module.parameters():
        parameter.data = parameter.data.float()
    arrays = graph.sample(0)
    inputs = tuple(torch.from_numpy(arrays[port.name]).float() for port in graph.inputs)
    with torch_networks.silent(), widened(graph.module), torch.no_grad():
        by_shape = trace(graph)
        by_value = torch.jit.trace(graph.module, inputs, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        results = [traced(*inputs) for traced in (by_shape, by_value)]
    kinds = [Counter(operations(traced)) for traced in (by_shape, by_value)]
    assert kinds[0]["aten::_convolution"] > 0
    assert kinds[0] == kinds[1]
    first, second = (result if isinstance(result, tuple) else (result,) for result in results)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def operations(traced: Any) -> Iterator[str]:
    """Kinds of the operations; constants are left out, which torch merges where their values are shared."""
    return (node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("aten::"))
