"""Numbers and strings as MIL text spells them."""

from __future__ import annotations

import math
import re

import numpy as np

from diffusion_runtime.mil.packing import pack
from diffusion_runtime.mil.program import DType, numpy_dtype, packed_bits

_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda match: _ESCAPED.get(match.group(1), match.group(1)), text)


def numbers_of(items: list[str], dtype: DType) -> np.ndarray:
    """Numbers to a flat array. Raises ValueError, KeyError or OverflowError for what ``dtype`` cannot hold."""
    target = numpy_dtype(dtype)
    if dtype is DType.BOOL:
        return np.array([{"true": True, "false": False}[item.strip()] for item in items], target)
    if target.kind == "f":
        exact = [_float(item.strip()) for item in items]
        with np.errstate(over="ignore"):
            rounded = np.array(exact, target)
        if any(math.isfinite(number) != fine for number, fine in zip(exact, np.isfinite(rounded), strict=True)):
            raise OverflowError
        return rounded
    array = np.array([int(item) for item in items], target)
    if bits := packed_bits(dtype):
        pack(array, bits)
    return array


def _float(text: str) -> float:
    if "nan" in text:
        raise ValueError(text)
    return float.fromhex(text) if "x" in text else float(text)
