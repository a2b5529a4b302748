"""What counts as a number in what callers give."""

from __future__ import annotations

import math
from numbers import Integral, Real


def is_number(value: object) -> bool:
    """A finite number, Python's or numpy's; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """A whole number, Python's or numpy's; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Integral)
