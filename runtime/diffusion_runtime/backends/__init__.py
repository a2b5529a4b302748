"""Where a model runs. A backend is found by name and loaded on demand: importing this module imports neither."""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from diffusion_runtime.errors import InputError
from diffusion_runtime.mil.program import Metadata


class ComputeUnits(enum.Enum):
    """The value is the spelling on the command line, the name is coremltools'."""

    ALL = "all"
    CPU_AND_GPU = "cpu-and-gpu"
    CPU_AND_NE = "cpu-and-ne"
    CPU_ONLY = "cpu-only"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """``dtype`` is numpy's name ("float16"); ``shape`` is the default shape, ``shapes`` are all that there are, if
    several."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shapes: tuple[tuple[int, ...], ...] = ()

    def takes(self, shape: tuple[int, ...]) -> bool:
        return shape == self.shape or shape in self.shapes

    @property
    def expected(self) -> str:
        return " or ".join(map(str, self.shapes or (self.shape,)))


class Model(Protocol):
    """A loaded model: arrays in by name, arrays out by name."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Run once. Raises InputError for a missing, unknown or mis-shaped array, naming expected and got."""


class LoadedModel(Model, Protocol):
    """A model of one file, which says what its author wrote into it."""

    @property
    def metadata(self) -> Metadata: ...


class Backend(Protocol):
    def load(self, path: Path, compute_units: ComputeUnits, function: str | None = None) -> LoadedModel:
        """Load an .mlpackage or .mlmodelc; of several functions the one of that name (None: the default one).
        Raises InputError (no such function), PackageError (damaged) or UnsupportedError (ops named)."""


BACKENDS = {
    "coreml": "diffusion_runtime.backends.coreml:CoreMLBackend",
    "torch": "diffusion_runtime.backends.torch_mil:TorchBackend",
}


def resolve(name: str) -> str:
    """The backend's own name: ``auto`` is coreml on macOS, else torch. Raises InputError for an unknown one."""
    if name == "auto":
        return "coreml" if sys.platform == "darwin" else "torch"
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: expected one of auto, {', '.join(BACKENDS)}")
    return name


def load_backend(name: str = "auto", *, dtype: str | None = None, device: str | None = None) -> Backend:
    """A backend by name. ``dtype`` and ``device`` are the torch backend's; None is its default."""
    name = resolve(name)
    options = {key: value for key, value in (("dtype", dtype), ("device", device)) if value is not None}
    if options and name != "torch":
        raise InputError(f"{' and '.join(options)} can be chosen with the torch backend only, not with {name}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(**options)
    return backend


def check_arrays(inputs: Mapping[str, TensorSpec], arrays: Mapping[str, np.ndarray], model: str) -> None:
    """Raise one InputError that lists every missing, unknown and mis-shaped array of a call to ``model``."""
    wrong = [f"missing {name}" for name in inputs if name not in arrays]
    wrong += [f"unknown {name}" for name in arrays if name not in inputs]
    wrong += [
        f"{name} has shape {tuple(arrays[name].shape)}, expected {spec.expected}"
        for name, spec in inputs.items()
        if name in arrays and not spec.takes(tuple(arrays[name].shape))
    ]
    if wrong:
        raise InputError(f"{model}: {'; '.join(wrong)} (inputs: {', '.join(inputs)})")
