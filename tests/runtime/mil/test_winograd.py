"""Winograd's convolutions: as precise as the direct ones, the same everywhere, and what is not finite stays so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_runtime.mil import winograd
from diffusion_runtime.mil.fuse import WATCHABLE, fuse
from diffusion_runtime.mil.lower import lower
from diffusion_runtime.mil.package import open_package

CHANNELS = winograd.MIN_CHANNELS


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_db(found: Tensor, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> float:
    """Of float64's largest magnitude over the root mean squared difference."""
    exact = F.conv2d(x.double(), kernel.double(), None if bias is None else bias.double(), padding=1)
    return float(10 * torch.log10(exact.abs().max() ** 2 / (found - exact).square().mean()))


@pytest.mark.parametrize("scale", [1.0, 65504.0, 1e-6])
@pytest.mark.parametrize("held", [1, 3 * 7 * 32, 2**18])  # one row of tiles at a time; parts of an image; all
def test_it_is_as_precise_as_the_direct_way(scale: float, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "HELD_ELEMENTS", held)
    x, kernel, bias = scale * randn(3, 24, 10, 14), randn(32, 24, 3, 3, seed=1), scale * randn(32, seed=2)
    found = winograd.conv2d(x, winograd.transform(kernel), bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error_db(found, x, kernel, bias) >= error_db(F.conv2d(x, kernel, bias, padding=1), x, kernel, bias) - 1
    torch.testing.assert_close(winograd.conv2d(x, winograd.transform(kernel), bias), found, rtol=0, atol=0)


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_what_is_not_finite_stays_where_the_direct_way_has_it(odd: float) -> None:
    x, kernel = randn(2, 24, 10, 14), randn(32, 24, 3, 3, seed=1)
    x[1, 5, 4, 6] = odd
    expected = F.conv2d(x, kernel, padding=1)
    found = winograd.conv2d(x, winograd.transform(kernel), None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not found.isfinite().all() and found.isfinite().sum() > found.numel() / 2


def saved(save_program: Callable[..., Path], size: int, width: int = CHANNELS, **given: Any) -> Path:
    kernel = np.random.default_rng(0).standard_normal((CHANNELS, width, 3, 3)).astype(np.float32)

    def body(mb: Any, x: Any) -> Any:
        return mb.conv(x=x, weight=kernel, **{"pad_type": "same", **given})

    return save_program(body, x=(2, width, size, size))


def test_a_program_computes_large_convolutions_by_it(save_program: Callable[..., Path]) -> None:
    package = open_package(saved(save_program, 32))
    module = fuse(lower(package))
    assert any(node.target is winograd.conv2d for node in module.graph.nodes)
    assert [buffer.shape for buffer in module.buffers()] == [(16, CHANNELS, CHANNELS)]
    x = randn(2, CHANNELS, 32, 32)
    (expected,), (found,) = lower(package)(x).values(), module(x).values()
    assert float((found - expected).square().mean().sqrt() / expected.abs().max()) < 1e-6


def test_kernels_that_stay_in_their_file_are_transformed_as_they_are_read(
    save_program: Callable[..., Path],
) -> None:
    package = open_package(saved(save_program, 8))
    module = fuse(lower(package, stream_weights=True), WATCHABLE)
    assert any(node.target is winograd.conv2d for node in module.graph.nodes)
    assert not list(module.buffers())
    x = randn(2, CHANNELS, 8, 8)
    (expected,), (found,) = lower(package)(x).values(), module(x).values()
    assert float((found - expected).square().mean().sqrt() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (30, {}),  # too few tiles
        (33, {}),
        (32, {"strides": [2, 2]}),
        (32, {"dilations": [2, 2]}),
        (32, {"pad_type": "valid"}),
        (32, {"width": CHANNELS // 2}),
    ],
)
def test_other_convolutions_are_left_alone(
    size: int, given: dict[str, Any], save_program: Callable[..., Path]
) -> None:
    module = fuse(lower(open_package(saved(save_program, size, **given))))
    assert not any(node.target is winograd.conv2d for node in module.graph.nodes)
