"""The edges of a picture, as ControlNets for edges were trained on them: OpenCV's Canny, bit for bit.

OpenCV's differs from the textbook's (Canny 1986) and from other libraries' so much that pictures steered by them
differ: it takes the colour channel that changes most, measures by |dx| + |dy|, and does not blur. Its own package
is 60 MB; what is needed of it is this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 100, 200
"""The thresholds of the ControlNets' authors and of diffusers' examples."""
TAN_22_5 = 13573  # times 2^15, as OpenCV rounds it: directions are told apart in whole numbers
SHIFT = 15


def canny(pixels: NDArray[np.uint8], low: int = LOW, high: int = HIGH) -> NDArray[np.uint8]:
    """Edges (height, width) of a picture (height, width, 3): 255 on an edge, else 0."""
    from scipy import ndimage

    dx, dy = _strongest(pixels)
    strength = np.abs(dx) + np.abs(dy)
    thin = (strength > low) & _is_ridge(dx, dy, np.pad(strength, 1))
    # What is above ``low`` counts where it hangs together with something above ``high``.
    parts, count = ndimage.label(thin, structure=np.ones((3, 3)))
    strong = np.zeros(count + 1, bool)
    strong[np.unique(parts[thin & (strength > high)])] = True
    strong[0] = False
    return np.where(strong[parts], np.uint8(255), np.uint8(0))


def _strongest(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's derivatives to the right and downwards (height, width), each place's of the channel that changes most
    there (the first of equals)."""
    from scipy import ndimage

    wide = pixels.astype(np.int32)
    dx, dy = (
        ndimage.correlate1d(
            ndimage.correlate1d(wide, (-1, 0, 1), along, mode="nearest"), (1, 2, 1), across, mode="nearest"
        )
        for along, across in ((1, 0), (0, 1))
    )
    channel = np.argmax(np.abs(dx) + np.abs(dy), axis=2)[..., None]
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]


def _is_ridge(dx: NDArray[np.int32], dy: NDArray[np.int32], strength: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the strength (height + 2, width + 2, zeros around) is the largest across the edge, whose direction is
    one of four. Of two equal neighbours to the right or below, the first is taken; OpenCV does so too."""
    own = strength[1:-1, 1:-1]
    left, right, above, below = strength[1:-1, :-2], strength[1:-1, 2:], strength[:-2, 1:-1], strength[2:, 1:-1]
    across, down = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << SHIFT
    flat = down < across * TAN_22_5
    steep = down > across * TAN_22_5 + (across << (SHIFT + 1))
    falling = (own > strength[:-2, :-2]) & (own > strength[2:, 2:])
    rising = (own > strength[:-2, 2:]) & (own > strength[2:, :-2])
    slanted = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(flat, (own > left) & (own >= right), np.where(steep, (own > above) & (own >= below), slanted))
