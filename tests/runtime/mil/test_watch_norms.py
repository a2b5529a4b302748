"""A written-out norm in one piece shows what each value on the way to it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_convert.verification.compare import psnr_db
from diffusion_runtime.mil.fuse import WATCHABLE, fuse
from diffusion_runtime.mil.lower import lower
from diffusion_runtime.mil.observe import observe
from diffusion_runtime.mil.package import open_package

SHAPE = (2, 8, 6, 4)
GROUPED = (4, 2, 6, 4)


def norm(mb: Any, x: Any, axes: tuple[int, ...] = (2, 3, 4)) -> Any:
    centred = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=axes, keep_dims=True))
    variance = mb.reduce_mean(x=mb.square(x=centred), axes=axes, keep_dims=True)
    return mb.real_div(x=centred, y=mb.sqrt(x=mb.add(x=variance, y=np.float32(1e-3))))


def in_groups(mb: Any, x: Any) -> Any:
    return mb.reshape(x=norm(mb, mb.reshape(x=x, shape=(x.shape[0], *GROUPED))), shape=x.shape)


def behind_a_convolution(mb: Any, x: Any) -> Any:
    """Whose result lies in channels-last memory."""
    weight = np.random.default_rng(1).standard_normal((8, 8, 3, 3)).astype(np.float32)
    return in_groups(mb, mb.conv(x=x, weight=weight, pad=[1, 1, 1, 1], pad_type="custom"))


def far_from_zero(bias: float) -> Callable[..., Any]:
    """A convolution's result in channels-last memory whose mean is so many times its deviation, about."""

    def body(mb: Any, x: Any) -> Any:
        weight = np.random.default_rng(1).standard_normal((8, 8, 3, 3)).astype(np.float32) / 8
        shift = np.full(8, bias, np.float32)
        return in_groups(mb, mb.conv(x=x, weight=weight, bias=shift, pad=[1, 1, 1, 1], pad_type="custom"))

    return body


def of_one_channel(mb: Any, x: Any) -> Any:
    return norm(mb, mb.reshape(x=x, shape=(x.shape[0], 8, 24)), (2,))


def watched(module: torch.fx.GraphModule, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, tuple[str, float]]]:
    """The output, and for each value its op and the largest magnitude that was shown."""
    largest: dict[str, tuple[str, float]] = {}
    (output,) = observe(
        module, [x], lambda name, op, value: largest.update({name: (op, float(value.abs().max()))})
    ).values()
    return output, largest


@pytest.mark.parametrize("body", [in_groups, behind_a_convolution, of_one_channel])
@pytest.mark.parametrize(("offset", "size"), [(0.0, 1.0), (30.0, 200.0)])
@pytest.mark.parametrize("rows", [2, 1])
def test_what_is_shown_is_what_the_values_reach(
    body: Callable[..., Any], offset: float, size: float, rows: int, save_program: Callable[..., Path]
) -> None:
    shape = (rows, *SHAPE[1:])
    package = open_package(save_program(body, x=shape))
    x = offset + size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain, apart = watched(lower(package), x)
    fused, shown = watched(module := fuse(lower(package), WATCHABLE), x)
    assert sum(node.meta.get("op") == "square" for node in module.graph.nodes) == 0
    assert shown.keys() == apart.keys()
    for name, (op, largest) in apart.items():
        assert shown[name][0] == op
        assert shown[name][1] == pytest.approx(largest, rel=1e-4), name
    assert torch.allclose(plain, fused, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [30.0, 100.0, 1000.0])
def test_a_mean_far_from_zero_costs_no_more_than_written_out(
    bias: float, rows: int, save_program: Callable[..., Path]
) -> None:
    shape = (rows, *SHAPE[1:])
    package = open_package(save_program(far_from_zero(bias), x=shape))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain, apart = watched(lower(package), x)
    fused, shown = watched(fuse(lower(package), WATCHABLE), x)
    assert psnr_db(plain.numpy(), fused.numpy()) > 90
    for name, (_, largest) in apart.items():
        assert shown[name][1] == pytest.approx(largest, rel=1e-3), name


def test_undefined_values_are_shown(save_program: Callable[..., Path]) -> None:
    package = open_package(save_program(in_groups, x=SHAPE))
    x = torch.randn(SHAPE)
    x[1, 2, 3, 1] = math.nan
    _, shown = watched(fuse(lower(package), WATCHABLE), x)
    steps = {op: size for op, size in shown.values() if op in ("sub", "square", "sqrt", "real_div")}
    assert len(steps) == 4
    assert all(math.isnan(size) for size in steps.values())


@pytest.mark.parametrize("fault", ["used elsewhere", "another mean", "first axis", "no square"])
def test_what_is_no_such_norm_stays(fault: str, save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        axes = (1, 2, 3) if fault == "first axis" else (2, 3)
        mean = mb.reduce_mean(x=mb.relu(x=x) if fault == "another mean" else x, axes=axes, keep_dims=True)
        centred = mb.sub(x=x, y=mean)
        square = mb.abs(x=centred) if fault == "no square" else mb.square(x=centred)
        variance = mb.reduce_mean(x=square, axes=axes, keep_dims=True)
        normal = mb.real_div(x=centred, y=mb.sqrt(x=mb.add(x=variance, y=np.float32(1e-3))))
        return (normal, mb.relu(x=centred)) if fault == "used elsewhere" else normal

    module = lower(open_package(save_program(body, x=SHAPE)))
    before = [node.meta.get("op") for node in module.graph.nodes]
    assert [node.meta.get("op") for node in fuse(module, WATCHABLE).graph.nodes] == before
