"""What each MIL op computes. ``extras.py`` has those that none of our packages holds and that other converters put
into theirs. Every other op is refused by name (`check.check_package`).

To add one: a function with ``@mil_op`` in the file where it belongs, and a row in ``test_ops_coremltools.py`` where
coremltools evaluates the op, else in ``test_ops_torch.py``."""

from diffusion_runtime.mil.ops import (
    convolution,
    elementwise,
    extras,
    indexing,
    linear,
    normalization,
    packed,
    pooling,
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
    "convolution",
    "elementwise",
    "extras",
    "indexing",
    "linear",
    "mil_op",
    "normalization",
    "packed",
    "pooling",
    "reduction",
    "resizing",
    "shaping",
]
