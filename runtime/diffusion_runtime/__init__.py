"""Runs converted Stable Diffusion models: Core ML on macOS, PyTorch everywhere.

from diffusion_runtime import load_pipeline

pipeline = load_pipeline("models")
pipeline("a large red circle on a white background", seed=1).images[0].save("circle.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from diffusion_runtime.errors import (
    CheckpointError,
    DiffusionError,
    HubError,
    InputError,
    InstallationError,
    PackageError,
    StorageError,
    UnsupportedError,
    VerificationError,
)

if TYPE_CHECKING:
    from diffusion_runtime.arguments import Result
    from diffusion_runtime.backends import ComputeUnits
    from diffusion_runtime.control import Control
    from diffusion_runtime.denoising import Step
    from diffusion_runtime.loading import load_pipeline
    from diffusion_runtime.pipeline import Pipeline, RuntimeNote
    from diffusion_runtime.stages import Run
    from diffusion_runtime.tasks.job import Request

__all__ = [
    "CheckpointError",
    "ComputeUnits",
    "Control",
    "DiffusionError",
    "HubError",
    "InputError",
    "InstallationError",
    "PackageError",
    "Pipeline",
    "Request",
    "Result",
    "Run",
    "RuntimeNote",
    "Step",
    "StorageError",
    "UnsupportedError",
    "VerificationError",
    "load_pipeline",
]
_LAZY = {
    "ComputeUnits": "diffusion_runtime.backends",
    "Control": "diffusion_runtime.control",
    "Pipeline": "diffusion_runtime.pipeline",
    "Request": "diffusion_runtime.tasks.job",
    "Result": "diffusion_runtime.arguments",
    "Run": "diffusion_runtime.stages",
    "RuntimeNote": "diffusion_runtime.pipeline",
    "Step": "diffusion_runtime.denoising",
    "load_pipeline": "diffusion_runtime.loading",
}
"""Names whose modules import large libraries: they are imported when a name is first used."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
