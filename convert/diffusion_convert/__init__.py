"""Stable Diffusion checkpoints to Core ML packages, on any machine.

from diffusion_convert import ConvertOptions, convert

convert("stable-diffusion-v1-5/stable-diffusion-v1-5", "models", ConvertOptions(nbits=6))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from diffusion_convert.option_values import Embedding, Lora
from diffusion_convert.options import ConvertOptions, Precision
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
from diffusion_runtime.families import AttentionKind

if TYPE_CHECKING:
    from diffusion_convert.conversion.convert import Conversion, convert
    from diffusion_convert.conversion.events import Event, Phase, Progress

__all__ = [
    "AttentionKind",
    "CheckpointError",
    "Conversion",
    "ConvertOptions",
    "DiffusionError",
    "Embedding",
    "Event",
    "HubError",
    "InputError",
    "InstallationError",
    "Lora",
    "PackageError",
    "Phase",
    "Precision",
    "Progress",
    "StorageError",
    "UnsupportedError",
    "VerificationError",
    "convert",
]
_LAZY = {
    "Conversion": "diffusion_convert.conversion.convert",
    "Event": "diffusion_convert.conversion.events",
    "Phase": "diffusion_convert.conversion.events",
    "Progress": "diffusion_convert.conversion.events",
    "convert": "diffusion_convert.conversion.convert",
}
"""Names whose modules import large libraries: they are imported when a name is first used."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
