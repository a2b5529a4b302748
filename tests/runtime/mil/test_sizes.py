"""What an operation makes is found once for all operations whose operands are laid out alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import OPS
from diffusion_runtime.mil.sizes import Sizes


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_only_another_layout_or_another_value_is_tried() -> None:
    calls = []

    def transpose(**arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        found: torch.Tensor = OPS["transpose"].function(**arguments)
        return found

    op, sizes = replace(OPS["transpose"], function=transpose), Sizes(1 << 30)
    arguments: list[dict[str, Any]] = [
        {"x": empty(2, 3), "perm": [1, 0]},
        {"x": empty(2, 3), "perm": [0, 1]},
        {"x": empty(3, 2), "perm": [1, 0]},
        {"x": empty(3, 2).t(), "perm": [1, 0]},
        {"x": empty(2, 3, dtype=torch.float16), "perm": [1, 0]},
    ]
    for _ in range(2):
        made = [one for given in arguments for one in sizes.results(op, given) or ()]
    assert len(calls) == len(arguments)
    assert [tuple(one.shape) for one in made] == [(3, 2), (2, 3), (2, 3), (3, 2), (3, 2)]
    assert made[4].dtype == torch.float16


def test_what_is_too_large_is_refused_each_time() -> None:
    sizes = Sizes(1000)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="expected at most"):
            sizes.results(OPS["add"], {"x": empty(20, 1), "y": empty(1, 20)})
    (made,) = sizes.results(OPS["add"], {"x": empty(5, 1), "y": empty(1, 5)}) or ()
    assert tuple(made.shape) == (5, 5)


def test_another_program_has_a_limit_of_its_own() -> None:
    arguments = {"x": empty(20, 1), "y": empty(1, 20)}
    assert Sizes(1 << 30).results(OPS["add"], arguments)
    with pytest.raises(UnsupportedError, match="expected at most"):
        Sizes(1000).results(OPS["add"], arguments)


def test_what_cannot_be_told_is_not_told_each_time() -> None:
    for _ in range(2):
        assert Sizes(1 << 30).results(OPS["matmul"], {"x": empty(2, 3), "y": empty(2, 3)}) is None
