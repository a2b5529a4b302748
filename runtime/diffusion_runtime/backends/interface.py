"""A model's interface, as its file declares it, as the `TensorSpec`s that callers work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_runtime.backends import TensorSpec
from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.program import Feature

NUMPY_NAMES: Mapping[str, str] = {
    "Float16": "float16",
    "Float32": "float32",
    "Double": "float64",
    "Int32": "int32",
    "Int8": "int8",
}


def specs(features: Sequence[Feature], path: Path) -> dict[str, TensorSpec]:
    """One spec per feature. Raises UnsupportedError for an image, a dictionary or the like."""
    for feature in features:
        if feature.kind != "multiArray" or feature.dtype not in NUMPY_NAMES:
            declared = f"{feature.kind} {feature.dtype}".strip()
            raise UnsupportedError(f"{path}: {feature.name} is declared as {declared}, expected a multi-array")
    return {
        item.name: TensorSpec(item.name, item.shape, NUMPY_NAMES[item.dtype], item.enumerated_shapes)
        for item in features
    }
