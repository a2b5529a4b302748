"""Where tensors lie: convolutions in channels-last memory, results in place.

In channels-last memory a 1x1 convolution over (batch, channels, 1, length) is a plain matrix product, and attention
and layer norms over channels find the channels of one position side by side: nothing is copied between them.
"""

from __future__ import annotations

import operator
import platform
from typing import Any

import torch
from torch import fx

from diffusion_runtime.memory import release
from diffusion_runtime.mil import fused
from diffusion_runtime.mil.match import operand, operation, others, put, shape_of, value_of, weight_of
from diffusion_runtime.mil.ops.convolution import paddings

CHANNELS_LAST_DEVICES = ("cpu", "cuda")
"""Where channels-last memory was tried and found fast."""

X86 = ("x86_64", "AMD64")
"""Processors of which torch's own compiler packs float32 kernels: elsewhere others than oneDNN may run them."""

RELEASE_EVERY = 128
"""After how many nodes memory is given back."""

_FRESH = frozenset(
    ("conv", "linear", "group_norm", "batch_norm", "add", "sub", "mul", "silu", "gelu", "matmul", "layer_norm")
)
"""Ops whose result lies in memory of its own."""


def use_channels_last(module: fx.GraphModule) -> None:
    """Two-dimensional convolutions run in channels-last memory."""
    for node in list(module.graph.nodes):
        arguments = _convolution(module, node) if operation(node) == "conv" else None
        if arguments is not None:
            put(module, node, fused.conv2d, arguments, "conv")


def _convolution(module: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """Arguments of ``fused.conv2d``; None if ``node`` is not a convolution with constant weights and even
    padding."""
    shape, kernel = shape_of(operand(node, "x")), weight_of(module, operand(node, "weight"))
    if shape is None or len(shape) != 4 or kernel is None or kernel.device.type not in CHANNELS_LAST_DEVICES:
        return None
    strides, dilations = operand(node, "strides") or [1, 1], operand(node, "dilations") or [1, 1]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel.shape[2:], dilations, strict=True)]
    pads = paddings(operand(node, "pad_type", "valid"), operand(node, "pad"), shape[2:], reach, strides)
    if any(before != after for before, after in pads):
        return None
    return {
        "x": operand(node, "x"),
        "weight": operand(node, "weight"),
        "bias": operand(node, "bias"),
        "strides": strides,
        "padding": [before for before, _ in pads],
        "dilations": dilations,
        "groups": operand(node, "groups", 1),
    }


def pack_kernels(module: fx.GraphModule) -> None:
    """Kernels of convolutions in channels-last memory lie as oneDNN wants them, which else reorders them anew in
    each call: of 1280 x 1280 x 3 x 3 over 8 x 8 pixels that is half the time."""
    if not (torch.backends.mkldnn.is_available() and platform.machine() in X86):  # type: ignore[no-untyped-call]
        return
    pack: Any = torch.ops.mkldnn._reorder_convolution_weight
    for count, node in enumerate(list(module.graph.nodes)):
        if count % RELEASE_EVERY == 0:
            release()
        weight: Any = operand(node, "weight") if node.target is fused.conv2d else None
        kernel, shape = value_of(module, weight), shape_of(operand(node, "x"))
        if kernel is None or shape is None or kernel.dtype != torch.float32 or len(weight.users) > 1:
            continue
        order = [operand(node, name) for name in ("padding", "strides", "dilations", "groups")]
        module.register_buffer(weight.target, pack(kernel, *order, list(shape)))
        put(module, node, fused.packed_conv2d, node.kwargs, "conv")
    release()


def reuse_memory(module: fx.GraphModule) -> None:
    """add, mul and silu write into an operand that nothing else needs."""
    targets = {"add": fused.add_into, "mul": fused.multiply_into}
    for node in list(module.graph.nodes):
        kind = operation(node)
        if kind == "silu" and _is_free(operand(node, "x"), node):
            put(module, node, fused.silu_into, {"x": operand(node, "x")}, kind)
        elif kind in targets:
            free = [side for side in (operand(node, "x"), operand(node, "y")) if _is_free(side, node)]
            if free:
                put(module, node, targets[kind], {"x": free[0], "y": others(node, free[0])[0]}, kind)


def _is_free(node: Any, user: fx.Node) -> bool:
    return (
        isinstance(node, fx.Node)
        and operation(node) in _FRESH
        and node.target is not operator.getitem
        and len(node.users) == 1
        and shape_of(node) is not None
        # A result that was broadcast does not fit into its operand's memory.
        and shape_of(node) == shape_of(user)
        and (operand(user, "y") is None or others(user, node)[0] is not node)
    )
