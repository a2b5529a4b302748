"""Group norms that are written out, in one piece, for who watches every value.

    mean = reduce_mean(x)    centred = x - mean    square = centred²    variance = reduce_mean(square)
    shifted = variance + epsilon    deviation = sqrt(shifted)    centred / deviation

Six values on the way to the last are never made. What they reach follows from each group's mean, deviation, least
and greatest element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from diffusion_runtime.mil.match import operand, operation, others, put, scalar, shape_of

STEPS = "steps"
"""In the metadata of a `normalize` node: its `Steps`."""

FAR_MEAN = 4.0
"""Of a group's mean in deviations."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The MIL names of the values on the way to a norm."""

    mean: str
    centred: str
    square: str
    variance: str
    shifted: str
    deviation: str


def fuse_plain_norms(module: fx.GraphModule) -> None:
    """Divisions that end a norm over all axes but the first two become `normalize`."""
    for node in list(module.graph.nodes):
        if operation(node) == "real_div":
            _fuse(module, node)


def _fuse(module: fx.GraphModule, node: fx.Node) -> None:
    centred, deviation = operand(node, "x"), operand(node, "y")
    if operation(centred) != "sub" or operation(deviation) != "sqrt":
        return
    x, mean, shifted = operand(centred, "x"), operand(centred, "y"), operand(deviation, "x")
    if operation(shifted) != "add":
        return
    for variance in (operand(shifted, "x"), operand(shifted, "y")):
        epsilon = scalar(module, others(shifted, variance)[0])
        if epsilon is None or not _is_mean(variance, square := _taken(variance)) or not _is_mean(mean, x):
            continue
        ways = {mean: {centred}, centred: {square, node}, square: {variance}, variance: {shifted}}
        ways |= {shifted: {deviation}, deviation: {node}}
        if operation(square) == "square" and _taken(square) is centred and _only(ways):
            names = Steps(*(str(one.meta["mil"]) for one in ways))
            put(module, node, normalize, {"x": x, "epsilon": epsilon}, "real_div").meta[STEPS] = names
        return


def _taken(node: Any) -> Any:
    return operand(node, "x") if isinstance(node, fx.Node) else None


def _is_mean(node: Any, x: Any) -> bool:
    """Whether ``node`` is the mean of ``x`` over all of its axes but the first two."""
    shape, axes = shape_of(x), operand(node, "axes") if operation(node) == "reduce_mean" else None
    if shape is None or len(shape) < 3 or not isinstance(axes, (list, tuple)) or _taken(node) is not x:
        return False
    kept = bool(operand(node, "keep_dims"))
    return kept and sorted(int(axis) % len(shape) for axis in axes) == list(range(2, len(shape)))


def _only(ways: dict[fx.Node, set[fx.Node]]) -> bool:
    """Whether each node has those users and no others."""
    return all(set(node.users) == users for node, users in ways.items())


def normalize(x: Tensor, epsilon: float) -> Tensor:
    """(batch, groups, ...): each group without its mean, over its deviation."""
    return _normalized(x, epsilon)[0]


def _normalized(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """And the means and inverse deviations, (batch, groups)."""
    batch, groups = x.shape[:2]
    flat = _dense(x.flatten(1, 2)) if x.dim() > 3 else x.contiguous()
    channels = flat.shape[1]
    size = flat[:1, :1].numel()
    found, mean, inverse = torch.native_group_norm(flat, None, None, batch, channels, size, groups, epsilon)
    if not flat.is_contiguous() and not bool(((mean * inverse).abs() < FAR_MEAN).all()):  # or undefined
        # In channels-last memory torch's kernel loses the deviation of what lies far from zero.
        flat = flat.contiguous()
        found, mean, inverse = torch.native_group_norm(flat, None, None, batch, channels, size, groups, epsilon)
    return found.view(x.shape), mean, inverse


def _dense(x: Tensor) -> Tensor:
    """``x`` as torch's kernel takes it: channels-last memory of one row has strides that do not look so."""
    if x.dim() == 4 and (last := x.permute(0, 2, 3, 1)).is_contiguous():
        return last.view(-1).view(last.shape).permute(0, 3, 1, 2)
    return x.contiguous()


def watched(node: fx.Node, x: Tensor, epsilon: float) -> tuple[Tensor, Iterator[tuple[str, str, Tensor]]]:
    """What `normalize` gives, and for each value on the way its name, op and, for each group, what it reaches."""
    found, mean, inverse = _normalized(x, epsilon)
    return found, _reached(node.meta[STEPS], x, mean, inverse, epsilon)


def _reached(
    steps: Steps, x: Tensor, mean: Tensor, inverse: Tensor, epsilon: float
) -> Iterator[tuple[str, str, Tensor]]:
    low, high = (_by_group(x, way) for way in (torch.amin, torch.amax))
    centred = torch.maximum(high - mean, mean - low)
    shifted = inverse.square().reciprocal()
    yield steps.mean, "reduce_mean", mean
    yield steps.centred, "sub", centred
    yield steps.square, "square", centred.square()
    yield steps.variance, "reduce_mean", shifted - epsilon
    yield steps.shifted, "add", shifted
    yield steps.deviation, "sqrt", inverse.reciprocal()


def _by_group(x: Tensor, way: Any) -> Tensor:
    """Over the last two axes first: in channels-last memory all channels of a position lie side by side."""
    last: Tensor = way(x, tuple(range(min(3, x.dim() - 1), x.dim())))
    return way(last, 2) if x.dim() > 3 else last
