"""Programs that do the same have the same digest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.mil.digest import Digests, digests_of
from diffusion_runtime.mil.fuse import PLAIN, WATCHABLE, fuse

RANDOM = np.random.default_rng(0)
SHAPE = (1, 16, 1, 40)
HEADS = 4
WEIGHTS = {name: RANDOM.standard_normal((16, 16, 1, 1)).astype(np.float32) for name in ("q", "k", "v")}


def digests(path: Path) -> Digests:
    return digests_of(fuse(TorchBackend(stream_weights=True, fuse=False).load(path).module, PLAIN))


def whole(mb: Any, x: Any, weights: Mapping[str, np.ndarray] = WEIGHTS, scale: float = 0.5) -> Any:
    """Attention with heads as a dimension."""
    convs = [mb.conv(x=x, weight=weight) for weight in weights.values()]
    q, k, v = (mb.reshape(x=one, shape=[1, HEADS, 4, 40]) for one in convs)
    scores = mb.mul(x=mb.matmul(x=q, y=k, transpose_x=True), y=np.float32(scale))
    mixed = mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v, transpose_y=True)
    return mb.reshape(x=mb.transpose(x=mixed, perm=[0, 1, 3, 2]), shape=SHAPE, name="mixed")


def parted(
    mb: Any,
    x: Any,
    weights: Mapping[str, np.ndarray] = WEIGHTS,
    scale: float = 0.5,
    order: tuple[int, ...] = tuple(range(HEADS)),
    pieces: tuple[int, ...] = (0, 1),
    swapped: bool = False,
) -> Any:
    """The same, each head by itself, and its queries in two pieces."""
    queries, keys, values = (mb.conv(x=x, weight=weight) for weight in weights.values())
    keys, values = (values, keys) if swapped else (keys, values)
    q, v = (mb.split(x=one, num_splits=HEADS, axis=1) for one in (queries, values))
    k = mb.split(x=mb.transpose(x=keys, perm=[0, 3, 2, 1]), num_splits=HEADS, axis=3)
    made = []
    for head in order:
        halves = mb.split(x=q[head], num_splits=2, axis=3)
        parts = []
        for piece in pieces:
            scores = mb.einsum(values=(k[head], halves[piece]), equation="bkhc,bchq->bkhq")
            weighted = mb.softmax(x=mb.mul(x=scores, y=np.float32(scale)), axis=1)
            parts.append(mb.einsum(values=(v[head], weighted), equation="bchk,bkhq->bchq"))
        made.append(mb.concat(values=parts, axis=3))
    return mb.concat(values=made, axis=1, name="mixed")


def changed(name: str) -> dict[str, np.ndarray]:
    """The weights, one element of one of them by the least that can be."""
    found = {one: weight.copy() for one, weight in WEIGHTS.items()}
    found[name][3, 5] = np.nextafter(found[name][3, 5], np.float32(9))
    return found


@pytest.fixture(scope="module")
def digest(save_program: Callable[..., Path]) -> Callable[..., str]:
    def digest(body: Callable[..., Any], **given: Any) -> str:
        return digests(save_program(lambda mb, x: body(mb, x, **given), x=SHAPE)).program

    return digest


def test_attention_is_the_same_however_it_is_taken_apart(digest: Callable[..., str]) -> None:
    assert digest(whole) == digest(whole) == digest(parted)


FAULTS: dict[str, dict[str, Any]] = {
    **{f"one element of {name}": {"weights": changed(name)} for name in WEIGHTS},
    "queries for keys": {"weights": {"q": WEIGHTS["k"], "k": WEIGHTS["q"], "v": WEIGHTS["v"]}},
    "scale": {"scale": 0.25},
    "heads in another order": {"order": (0, 2, 1, 3)},
    "a head twice": {"order": (0, 1, 2, 2)},
    "pieces in another order": {"pieces": (1, 0)},
    "a piece twice": {"pieces": (0, 0)},
    "values for keys": {"swapped": True},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_attention_with_a_fault_is_another_program(digest: Callable[..., str], fault: str) -> None:
    expected, given = digest(whole), FAULTS[fault]
    assert digest(parted, **given) != expected
    if set(given) <= {"weights", "scale"}:
        assert digest(whole, **given) != expected


def chain(mb: Any, x: Any, **given: Any) -> Any:
    told: dict[str, Any] = {"epsilon": 1e-5, "axes": [1], "first": "relu", "both": False, "dtype": "fp32"} | given
    y = getattr(mb, told["first"])(x=x)
    y = mb.layer_norm(x=y, axes=told["axes"], epsilon=np.float32(told["epsilon"]))
    y = mb.sub(x=y, y=x) if told["both"] else mb.sub(x=x, y=y)
    return mb.cast(x=y, dtype=told["dtype"], name=told.get("name", "found"))


@pytest.mark.parametrize(
    "other",
    [
        {"epsilon": 1e-6},
        {"axes": [3]},
        {"first": "sigmoid"},
        {"both": True},
        {"dtype": "int32"},
        {"name": "another"},
    ],
    ids=str,
)
def test_options_order_types_and_outputs_belong_to_it(digest: Callable[..., str], other: dict[str, Any]) -> None:
    assert digest(chain) == digest(chain)
    assert digest(chain, **other) != digest(chain)


def test_how_often_a_value_is_computed_belongs_to_it(digest: Callable[..., str]) -> None:
    """Rewrites ask who else uses a value, and so may give others."""

    def squares(mb: Any, x: Any, twice: bool) -> Any:
        first = mb.square(x=x)
        return mb.add(x=first, y=mb.square(x=x) if twice else first, name="found")

    assert digest(squares, twice=False) != digest(squares, twice=True)


def test_what_is_not_known_here_is_like_nothing_else(save_program: Callable[..., Path]) -> None:
    path = save_program(chain, x=SHAPE)
    module = TorchBackend(fuse=False).load(path).module
    assert digests_of(module) == digests_of(module)
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    node.kwargs = {**node.kwargs, "odd": slice(1)}
    assert digests_of(module).program != digests_of(module).program


def test_each_value_that_a_run_shows_has_one(save_program: Callable[..., Path]) -> None:
    """Also what is on the way to a norm, and scores; the same in both forms, but for what is moved alone."""

    def body(mb: Any, x: Any, attend: Callable[..., Any]) -> Any:
        groups = mb.reshape(x=attend(mb, x), shape=[1, 4, 4, 40])
        centred = mb.sub(x=groups, y=mb.reduce_mean(x=groups, axes=[2, 3], keep_dims=True))
        variance = mb.reduce_mean(x=mb.square(x=centred), axes=[2, 3], keep_dims=True)
        return mb.real_div(x=centred, y=mb.sqrt(x=mb.add(x=variance, y=np.float32(1e-5))), name="normed")

    given = RANDOM.standard_normal(SHAPE).astype(np.float32)
    seen: list[dict[str, float]] = []
    for attend in (whole, parted):
        path = save_program(lambda mb, x, attend=attend: body(mb, x, attend), x=SHAPE)
        values = digests(path).values
        model = TorchBackend(stream_weights=True, fuse=False).load(path)
        fuse(model.module, WATCHABLE)
        sizes: dict[str, float] = {}

        def watch(name: str, _: str, value: Any, to: dict[str, float] = sizes, known: Any = values) -> None:
            to[known[name]] = max(to.get(known[name], 0.0), float(value.abs().max()))

        model.observe(watch, x=given)
        seen.append(sizes)
    assert seen[0] == seen[1]
    assert len(seen[0]) >= 12
