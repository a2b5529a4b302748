"""What each MIL op computes. ``extras.py`` has those that none of our packages holds and that other converters put
into theirs. Every other op is refused by name (`check.check_package`).

To add one: a function with ``@mil_op`` in the file where it belongs, and a row in ``test_ops_coremltools.py`` where
coremltools evaluates the op, else in ``test_ops_torch.py``."""

# To import them is to register their functions in `registry.OPS`.
from diffusion_runtime.mil.ops import (  # noqa: F401
    convolution,
    elementwise,
    extras,
    linear,
    normalization,
    packed,
    pooling,
    reduction,
    resizing,
    shaping,
)
