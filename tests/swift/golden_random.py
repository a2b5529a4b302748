"""Golden values of the random number generators: what torch, NumPy and our Philox draw, as bits of float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_runtime import noise

# Fewer than 16 values take torch's path for single ones, 16 and more its vector path; 33 and 1000 have a tail that
# is no multiple of 16. An odd number of single values leaves one for the next such call.
CALLS = (1, 16, 7, 33, 3, 64, 15, 1000, 2, 4 * 9 * 9)
SEEDS = (1, 2**32 - 1, 2**64 - 2)


def values() -> list[dict[str, Any]]:
    """For every source and seed the calls that were made, one after the other, and what they gave."""
    return [_case(source, seed) for source in noise.RNGS for seed in SEEDS if source != "numpy" or seed < 2**32]


def _case(source: str, seed: int) -> dict[str, Any]:
    drawn = noise.from_seeds([seed], source)
    parts = [drawn.normal((count,)).numpy().astype("<f4") for count in CALLS]
    bits = np.concatenate(parts).view("<u4")
    return {"source": source, "seed": seed, "calls": list(CALLS), "bits": [int(bit) for bit in bits]}
