"""Attention whose scores are too many to hold, op by op: some rows of the scores at a time.

The scores of 768x768 pixels are 3.4 GB for a batch of two, and as much again what a softmax makes of them. Each row
of a product, of what is done to its elements and of a softmax depends on one row of queries only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffusion_runtime.mil.match import operand, operation, shape_of

HELD_ELEMENTS = 2**25
"""Scores with more elements are computed in parts of at most this many."""

ELEMENTWISE = frozenset(("cast", "mul", "add", "sub", "real_div"))


@dataclass(frozen=True, slots=True)
class Rows:
    """A value of ``shape`` that is not held: ``part`` computes rows of it, which are its last axis but one."""

    shape: tuple[int, ...]
    part: Callable[[slice], Tensor]

    def parts(self) -> Iterator[Tensor]:
        rows = self.shape[-2]
        # At least one row, however long.
        step = max(1, HELD_ELEMENTS * rows // math.prod(self.shape))
        for start in range(0, rows, step):
            yield self.part(slice(start, min(start + step, rows)))


def large_scores(module: fx.GraphModule) -> frozenset[fx.Node]:
    """Nodes whose values are too large to hold and are needed once: a product, elementwise ops and a softmax, on
    the way to another product."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        shape = shape_of(node)
        if operation(node) == "softmax" and shape is not None and math.prod(shape) > HELD_ELEMENTS:
            found.update(_scores(node, shape))
    return frozenset(found)


def defer(node: fx.Node, arguments: Mapping[str, Any], show: Callable[[fx.Node, Tensor], None]) -> Rows:
    """The value of one of `large_scores`, not computed yet; ``show`` is called with each part that is."""
    shape = shape_of(node)
    assert shape is not None and callable(node.target)  # noqa: S101  (of `large_scores`)
    compute, first = node.target, operation(node) == "matmul"

    def part(rows: slice) -> Tensor:
        if first:
            axis = -1 if arguments.get("transpose_x") else -2
            some = {**arguments, "x": _narrow(arguments["x"], axis, rows)}
        else:
            some = {name: _part(value, shape[-2], rows) for name, value in arguments.items()}
        value: Tensor = compute(**some)
        show(node, value)
        return value

    return Rows(shape, part)


def product(node: fx.Node, arguments: Mapping[str, Any]) -> Tensor:
    """The value of a product with one operand that is not held."""
    name = "x" if isinstance(arguments["x"], Rows) else "y"
    function: Any = node.target
    parts = [function(**{**arguments, name: part}) for part in arguments[name].parts()]
    return torch.cat(parts, dim=-2 if name == "x" else -1)


def scores_in_parts(query: Tensor, key: Tensor) -> Iterator[Tensor]:
    """query keyᵀ over (batch, ..., length, width), some rows at a time."""
    shape = (*query.shape[:-1], key.shape[-2])
    yield from Rows(tuple(shape), lambda rows: _narrow(query, -2, rows) @ key.transpose(-1, -2)).parts()


def _scores(softmax: fx.Node, shape: tuple[int, ...]) -> list[fx.Node]:
    """The nodes from the product to the last before the other, where ``softmax`` is between two; else none."""
    if len(shape) < 2 or operand(softmax, "axis", -1) % len(shape) != len(shape) - 1:
        return []
    nodes = [softmax]
    while operation(nodes[0]) != "matmul":
        inner = [x for x in nodes[0].all_input_nodes if len(x.users) == 1 and shape_of(x) == shape]
        if not inner or operation(inner[0]) not in ELEMENTWISE | {"matmul"}:
            return []
        nodes.insert(0, inner[0])
    while len(nodes[-1].users) == 1:
        user = next(iter(nodes[-1].users))
        if operation(user) == "matmul":
            return nodes if _is_by_rows(user, nodes[-1]) else []
        if operation(user) not in ELEMENTWISE or shape_of(user) != shape:
            return []
        nodes.append(user)
    return []


def _is_by_rows(node: fx.Node, scores: fx.Node) -> bool:
    """Whether a product needs its operand ``scores`` by rows: on the left, or transposed on the right."""
    x, y = operand(node, "x"), operand(node, "y")
    if x is scores:
        return y is not scores and not operand(node, "transpose_x", False)
    return y is scores and bool(operand(node, "transpose_y", False))


def _part(value: Any, rows: int, chosen: slice) -> Any:
    if isinstance(value, Rows):
        return value.part(chosen)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-2] == rows:
        return _narrow(value, -2, chosen)
    return value


def _narrow(value: Tensor, axis: int, chosen: slice) -> Tensor:
    return value.narrow(axis, chosen.start, chosen.stop - chosen.start)
