"""What each MIL op computes. To add one: a function with ``@mil_op`` in the file where it belongs, and a row in
``tests/runtime/mil/test_ops.py``."""

from diffusion_runtime.mil.ops import (
    activation,
    convolution,
    elementwise,
    indexing,
    linear,
    normalization,
    packed,
    pooling,
    recurrent,
    reduction,
    resizing,
    shaping,
)
from diffusion_runtime.mil.ops.registry import OPS, Kind, Op, Parameter, mil_op

__all__ = [
    "OPS",
    "Kind",
    "Op",
    "Parameter",
    "activation",
    "convolution",
    "elementwise",
    "indexing",
    "linear",
    "mil_op",
    "normalization",
    "packed",
    "pooling",
    "recurrent",
    "reduction",
    "resizing",
    "shaping",
]
