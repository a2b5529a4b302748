"""Rewrites of a lowered program: what a converter took apart is put together again, with torch's own kernels.

Each pass takes the module, changes its graph, and changes its results by rounding at most. A pattern that
does not fit exactly is left alone. Values that a pass swallows no longer exist by their MIL names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from diffusion_runtime.mil import fused
from diffusion_runtime.mil.fuse_attention import fuse_attention, fuse_plain_attention
from diffusion_runtime.mil.match import (
    drop_unused,
    only_user,
    operand,
    operation,
    others,
    put,
    put_buffer,
    scalar,
    shape_of,
    value_of,
)
from diffusion_runtime.mil.memory_format import pack_kernels, reuse_memory, use_channels_last
from diffusion_runtime.mil.ops import normalization
from diffusion_runtime.mil.ops.registry import OPS
from diffusion_runtime.mil.watch_norms import fuse_plain_norms
from diffusion_runtime.mil.winograd import use_winograd

Pass = Callable[[fx.GraphModule], None]


def fuse(module: fx.GraphModule, passes: Sequence[Pass] | None = None) -> fx.GraphModule:
    """Apply ``passes`` (None: all) in place and return the module."""
    for rewrite in PASSES if passes is None else passes:
        rewrite(module)
        drop_unused(module)
    module.graph.lint()
    module.recompile()
    return module


# --- normalisations


def fuse_norms(module: fx.GraphModule) -> None:
    """(x - mean) / sqrt(variance + epsilon), written out, becomes a layer norm; between reshapes a group norm."""
    for node in list(module.graph.nodes):
        found = _normalized(module, node)
        if found is None:
            continue
        x, axes, epsilon = found
        if not _fuse_group_norm(module, node, x, axes, epsilon):
            put(module, node, normalization.layer_norm, {"x": x, "axes": axes, "epsilon": epsilon}, "layer_norm")


def _normalized(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[int], float] | None:
    """The tensor, axes and epsilon of a normalisation that ends in ``node``."""
    kind = operation(node)
    if kind == "real_div":
        centred, root, epsilon = operand(node, "x"), operand(node, "y"), 0.0
        if operation(root) != "sqrt":
            return None
    elif kind == "mul":
        sides = [side for side in (operand(node, "x"), operand(node, "y")) if operation(side) == "rsqrt"]
        if len(sides) != 1:
            return None
        root = sides[0]
        centred, epsilon = others(node, root)[0], float(operand(root, "epsilon", 1e-12))
    else:
        return None
    plus = operand(root, "x")
    if operation(plus) != "add" or operation(centred) != "sub":
        return None
    for variance in (operand(plus, "x"), operand(plus, "y")):
        constant = scalar(module, others(plus, variance)[0])
        if operation(variance) == "reduce_mean" and constant is not None:
            return _centred(centred, variance, epsilon + constant)
    return None


def _centred(centred: fx.Node, variance: fx.Node, epsilon: float) -> tuple[fx.Node, list[int], float] | None:
    x, mean, square = operand(centred, "x"), operand(centred, "y"), operand(variance, "x")
    is_square = operation(square) == "square" and operand(square, "x") is centred
    is_square |= operation(square) == "mul" and operand(square, "x") is operand(square, "y") is centred
    axes = _axes(mean, x)
    if not is_square or operation(mean) != "reduce_mean" or operand(mean, "x") is not x:
        return None
    if axes is None or axes != _axes(variance, x):
        return None
    return x, axes, epsilon


def _axes(mean: fx.Node, x: fx.Node) -> list[int] | None:
    axes, shape = operand(mean, "axes"), shape_of(x)
    if not isinstance(axes, Sequence) or shape is None or not operand(mean, "keep_dims"):
        return None
    return sorted(int(axis) % len(shape) for axis in axes)


def _fuse_group_norm(
    module: fx.GraphModule, node: fx.Node, grouped: fx.Node, axes: list[int], epsilon: float
) -> bool:
    shape = shape_of(grouped)
    if operation(grouped) != "reshape" or shape is None or axes != list(range(2, len(shape))):
        return False
    x = operand(grouped, "x")
    source = shape_of(x)
    if source is None or len(source) < 2 or source[0] != shape[0] or source[1] % shape[1]:
        return False
    done = False
    for user in list(node.users):
        if operation(user) == "reshape" and shape_of(user) == source:
            end, weight, bias = _affine(module, user, source[1], len(source))
            arguments = {"x": x, "groups": shape[1], "weight": weight, "bias": bias, "epsilon": epsilon}
            put(module, end, fused.group_norm, arguments, "group_norm")
            done = True
    return done


def _affine(
    module: fx.GraphModule, node: fx.Node, channels: int, rank: int
) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """The last node of a per-channel scale and shift behind ``node``, with both as new constants."""
    user = only_user(node)
    if user is not None and operation(user) == "batch_norm" and operand(user, "x") is node:
        scale, shift = _batch_norm(module, user)
        if scale is not None and shift is not None:
            return user, put_buffer(module, user, scale, "weight"), put_buffer(module, user, shift, "bias")
    if user is None or operation(user) != "mul":
        return node, None, None
    weight = _per_channel(module, others(user, node)[0], channels, rank)
    after = only_user(user)
    if weight is None or after is None or operation(after) != "add":
        return node, None, None
    bias = _per_channel(module, others(after, user)[0], channels, rank)
    if bias is None:
        return node, None, None
    return after, put_buffer(module, after, weight, "weight"), put_buffer(module, after, bias, "bias")


def _batch_norm(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    mean, variance, gamma, beta = (
        value_of(module, operand(node, name)) for name in ("mean", "variance", "gamma", "beta")
    )
    if mean is None or variance is None:
        return None, None
    # In float64, rounded once at the end.
    scale = torch.rsqrt(variance.double() + float(operand(node, "epsilon", 1e-5)))
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return scale.to(mean.dtype), shift.to(mean.dtype)


def _per_channel(module: fx.GraphModule, node: fx.Node, channels: int, rank: int) -> Tensor | None:
    value = value_of(module, node)
    if value is None or value.ndim > rank or value.numel() != channels:
        return None
    # Broadcasting counts axes from the end: (C, 1, 1) is per channel, (C,) is per column.
    aligned = (1,) * (rank - value.ndim) + tuple(value.shape)
    return value.reshape(-1) if aligned[1] == channels else None


# --- activations


def fuse_silu(module: fx.GraphModule) -> None:
    """x · sigmoid(x) becomes silu(x)."""
    for node in list(module.graph.nodes):
        if operation(node) != "mul":
            continue
        for side in (operand(node, "x"), operand(node, "y")):
            if operation(side) == "sigmoid" and others(node, side) == [operand(side, "x")]:
                put(module, node, OPS["silu"].function, {"x": operand(side, "x")}, "silu")
                break


DIFFERENTIABLE: tuple[Pass, ...] = (fuse_norms, fuse_silu, fuse_attention)
"""Passes after which gradients can be taken: nothing writes into what a backward pass needs."""

PLAIN: tuple[Pass, ...] = (fuse_plain_attention, fuse_plain_norms)
"""Passes after which programs are alike that take attention apart in different ways (`digest`)."""

WATCHABLE: tuple[Pass, ...] = (*PLAIN, use_channels_last, use_winograd)
"""Passes after which every value can still be watched, or what it reaches is known (`observe.SCORES`,
`watch_norms`)."""

PASSES: tuple[Pass, ...] = (*DIFFERENTIABLE, use_channels_last, use_winograd, pack_kernels, reuse_memory)
