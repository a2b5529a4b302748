"""3x3 convolutions by Winograd's F(2x2, 3x3): 16 multiplications for 2x2 outputs, where the direct way takes 36.

In one dimension, two outputs of four inputs d and a kernel g of three are::

    y0 = d0 g0 + d1 g1 + d2 g2 = m0 + m1 + m2        m0 = (d0 - d2) g0      m1 = (d1 + d2) (g0 + g1 + g2) / 2
    y1 = d1 g0 + d2 g1 + d3 g2 = m1 - m2 - m3        m3 = (d1 - d3) g2      m2 = (d2 - d1) (g0 - g1 + g2) / 2

In two, rows and columns are transformed alike: (Aᵀ ⊗ Aᵀ) [(G ⊗ G) g · (Bᵀ ⊗ Bᵀ) d], and what is multiplied element
by element for one channel is, for all, a product of matrices for each of the 16 elements.

It is as precise as the direct way: inputs are added and subtracted four at a time, outputs nine at a time, and
each product is summed over the channels alone in place of nine times as many terms. Against float64 random inputs
give 142 dB, the direct way 135. (Larger tiles, F(4x4, 3x3), multiply by up to 8 on the way and lose 16 dB.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from diffusion_runtime.mil import fused
from diffusion_runtime.mil.match import operand, put, put_buffer, shape_of, weight_of

MIN_CHANNELS = 256
"""With fewer channels, in or out, the sums before and after the products take longer than what is saved."""
MIN_TILES = 512
"""2x2 outputs, of all rows of the batch; with fewer, what is saved is not worth the memory: a transformed kernel is
16/9 as large. 512: 32x32 pixels in a batch of two."""
MIN_TILES_OF_STREAMED = 32
"""The same where the kernel is transformed each time, as it is read from its file, and not held."""
HELD_ELEMENTS = 2**18
"""Inputs of a channel times tiles that are transformed at once, so that they stay in the processor's cache."""


def use_winograd(module: fx.GraphModule) -> None:
    """Convolutions in channels-last memory that gain by it; their kernels are kept transformed, or become so when
    they are read."""
    for node in list(module.graph.nodes):
        weight: Any = operand(node, "weight") if node.target is fused.conv2d else None
        kernel = weight_of(module, weight)
        if kernel is None or not _fits(node, kernel):
            continue
        arguments = {"x": operand(node, "x"), "weight": weight, "bias": operand(node, "bias")}
        if isinstance(kernel, Tensor):
            arguments["weight"] = put_buffer(module, node, transform(kernel), "winograd")
        elif len(weight.users) == 1:
            kernel.register_forward_hook(lambda _module, _inputs, value: transform(value))
        else:
            continue
        put(module, node, conv2d, arguments, "conv")
        if not weight.users:  # now, not after the pass: all kernels twice would be too much memory
            module.graph.erase_node(weight)
            delattr(module, weight.target)


def _fits(node: fx.Node, kernel: Any) -> bool:
    """Whether the convolution with ``kernel`` is one that gains."""
    shape = shape_of(operand(node, "x"))
    if shape is None or kernel.dtype != torch.float32 or kernel.device.type != "cpu":
        return False
    plain = {"strides": [1, 1], "padding": [1, 1], "dilations": [1, 1], "groups": 1}
    batch, _, height, width = shape
    least = MIN_TILES if isinstance(kernel, Tensor) else MIN_TILES_OF_STREAMED
    return (
        kernel.shape[2:] == (3, 3)
        and all(operand(node, name) == value for name, value in plain.items())
        and height % 2 == width % 2 == 0
        and batch * height * width // 4 >= least
        and min(kernel.shape[:2]) >= MIN_CHANNELS
    )


def transform(kernel: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (16, out, in)."""
    out, channels = kernel.shape[:2]
    return (_matrices()[0] @ kernel.reshape(out * channels, 9).T).view(16, out, channels)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of ``x`` (batch, channels, height, width; both even) with what ``transform`` made of its
    kernel, with a border of one zero; in channels-last memory."""
    batch, channels, height, width = x.shape
    out, rows, columns = weight.shape[1], height // 2, width // 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    y = x.new_empty(batch, rows, 2, columns, 2, out)
    for images, lines in _bands(batch, rows, HELD_ELEMENTS // (max(channels, out) * columns)):
        tiles = _transformed(padded[images, 2 * lines.start : 2 * lines.stop + 2])
        products = torch.bmm(tiles.view(16, -1, channels), weight.transpose(1, 2)).view(16, -1)
        made = (_matrices()[1] @ products).view(2, 2, *tiles.shape[2:5], out)
        torch.add(made.permute(2, 3, 0, 4, 1, 5), 0.0 if bias is None else bias, out=y[images, lines])
    found = y.view(batch, height, width, out).permute(0, 3, 1, 2)
    # Infinite inputs, and sums beyond float32, become undefined numbers here, and in all of a tile.
    return found if bool(found.sum().isfinite()) else F.conv2d(x, _restore(weight), bias, padding=1)


def _transformed(x: Tensor) -> Tensor:
    """(images, rows, columns, channels) -> Bᵀ d B of the tiles: (4, 4, images, rows / 2 - 1, columns / 2 - 1,
    channels)."""
    images, height, width, channels = x.shape
    rows, columns = height // 2 - 1, width // 2 - 1
    half = x.new_empty(4, images, rows, width, channels)
    _combine([x[:, at : at + 2 * rows : 2] for at in range(4)], half)
    tiles = x.new_empty(4, 4, images, rows, columns, channels)
    _combine([half[:, :, :, at : at + 2 * columns : 2] for at in range(4)], tiles.transpose(0, 1))
    return tiles


def _combine(d: Sequence[Tensor], out: Tensor) -> None:
    """Bᵀ d: sums, not a product of matrices, so that each element is read where it lies."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _restore(weight: Tensor) -> Tensor:
    """The kernel that ``weight`` was made of, to rounding."""
    out, channels = weight.shape[1:]
    inverse = torch.linalg.pinv(_matrices()[0].double()).float()
    kernel: Tensor = inverse @ weight.view(16, -1)
    return kernel.T.reshape(out, channels, 3, 3)


def _bands(batch: int, rows: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of their rows of tiles, of about ``most`` rows in all: whole images, or parts of one."""
    images = max(1, most // rows)
    lines = min(rows, max(1, most))
    for image in range(0, batch, images):
        for line in range(0, rows, lines):
            yield slice(image, image + images), slice(line, line + lines)


@cache
def _matrices() -> tuple[Tensor, Tensor]:
    """G ⊗ G and Aᵀ ⊗ Aᵀ."""
    kernels = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    outputs = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
    return torch.kron(kernels, kernels), torch.kron(outputs, outputs)
