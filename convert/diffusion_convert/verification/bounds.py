"""How much of a component's outputs palettization may cost before nothing is written."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MIN_PSNR_DB: Mapping[int, float] = {1: 3.0, 2: 6.0, 3: 10.0, 4: 14.0, 6: 24.0, 8: 34.0}
"""Per bit width, the least PSNR of outputs against the float16 package's. A random network keeps about 6 dB per bit
and 6 more for the peak; what is broken has less than 3 dB at any width. A component may own stricter ones."""


def bound_db(average_bits: float, bounds: Mapping[int, float] = MIN_PSNR_DB) -> float:
    """The bound at ``average_bits``, interpolated between the two nearest bit widths."""
    widths = sorted(bounds)
    return float(np.interp(average_bits, widths, [bounds[bits] for bits in widths]))
