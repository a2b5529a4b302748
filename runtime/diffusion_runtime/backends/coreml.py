"""Core ML on macOS, through coremltools: a compiled model is loaded as it is, a package is compiled once and kept.

Core ML compiles a package at every load, which takes minutes for a UNet. So packages are compiled into a cache that
is keyed by what they contain; the system's own caches, which are keyed by path, then work too.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_runtime.atomic import check_writable, move_into_place, work
from diffusion_runtime.backends import ComputeUnits, TensorSpec, check_arrays
from diffusion_runtime.backends.interface import specs
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import DiffusionError, InstallationError, PackageError, first_line
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import Metadata

CACHE_VARIABLE = "COREML_SD_CACHE"
DEVICES: Mapping[str, str] = {
    "MLCPUComputeDevice": "cpu",
    "MLGPUComputeDevice": "gpu",
    "MLNeuralEngineComputeDevice": "neural engine",
}
"""coremltools' classes of devices -> what reports call them."""


def default_cache() -> Path:
    """Where compiled models are kept, unless the environment variable says otherwise."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / "Library" / "Caches" / "coreml-sd" / "compiled"


@dataclass(frozen=True, slots=True)
class CoreMLBackend:
    """``cache`` is the folder of compiled models."""

    cache: Path = field(default_factory=default_cache)

    def load(self, path: Path, compute_units: ComputeUnits, function: str | None = None) -> CoreMLModel:
        """Load an .mlpackage or .mlmodelc. Raises InstallationError on other systems, InputError where there is no
        such function, PackageError where the model is damaged or Core ML refuses it."""
        if platform.system() != "Darwin":
            raise InstallationError("the coreml backend needs macOS; use `--backend torch` on this machine")
        described = open_package(path).of(function).model
        interface = described.interface
        coremltools = import_coremltools()
        units = coremltools.ComputeUnit[compute_units.name]
        try:
            model = self._open(coremltools, path, {"compute_units": units, "function_name": function})
        except Exception as error:  # coremltools raises bare Exception and whatever Core ML reports
            raise PackageError(f"{path}: Core ML cannot load it: {first_line(error)}") from error
        inputs, outputs = specs(interface.inputs, path), specs(interface.outputs, path)
        return CoreMLModel(path, inputs, outputs, described.metadata, model)

    def _open(self, coremltools: Any, path: Path, options: Mapping[str, Any]) -> Any:
        if path.suffix == ".mlmodelc":
            return coremltools.models.CompiledMLModel(str(path), **options)
        target = self.cache / f"{content_key(path)}.mlmodelc"
        if target.is_dir():
            try:
                return coremltools.models.CompiledMLModel(str(target), **options)
            except Exception:  # of another system's version, or damaged: compile it anew; that says what is wrong
                self._remove(target)
        compiled = self._compiled(coremltools, path, target)
        if compiled is None:
            return coremltools.models.MLModel(str(path), **options)
        return coremltools.models.CompiledMLModel(str(compiled), **options)

    def _compiled(self, coremltools: Any, path: Path, target: Path) -> Path | None:
        """The package compiled into the cache; None where nothing can be written there."""
        try:
            check_writable(self.cache)
        except DiffusionError:
            return None
        with work(self.cache) as slot:
            made = coremltools.models.utils.compile_model(str(path), str(slot / "model.mlmodelc"))
            move_into_place(Path(made), target)  # another process may have been faster, with the same result
        return target

    def _remove(self, target: Path) -> None:
        with suppress(OSError, DiffusionError), work(self.cache) as slot:
            target.rename(slot / target.name)


@dataclass(frozen=True, slots=True)
class CoreMLModel:
    """A loaded model; ``model`` is coremltools' MLModel or CompiledMLModel."""

    path: Path
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    metadata: Metadata
    model: Any

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Run once. Raises InputError for arrays that do not fit, DiffusionError where Core ML fails."""
        check_arrays(self.inputs, arrays, self.path.name)
        try:
            results = self.model.predict(dict(arrays))
        except Exception as error:
            raise DiffusionError(
                f"{self.path.name}: Core ML failed: {first_line(error)}; try other compute units, for example "
                "--compute-units cpu-and-gpu"
            ) from error
        return {name: np.asarray(results[name]) for name in self.outputs}


def operation_devices(path: Path, compute_units: ComputeUnits) -> dict[str, int]:
    """How many operations of a model Core ML plans to run on "cpu", "gpu" and "neural engine"; empty where the
    system cannot tell (before macOS 14.4). A package is looked for among those that were compiled."""
    coremltools = import_coremltools()
    compiled = path if path.suffix == ".mlmodelc" else default_cache() / f"{content_key(path)}.mlmodelc"
    if not compiled.is_dir():
        return {}
    plans = import_coremltools("models.compute_plan").MLComputePlan
    try:
        plan = plans.load_from_path(str(compiled), coremltools.ComputeUnit[compute_units.name])
        program = plan.model_structure.program
    except Exception:  # ValueError before macOS 14.4; whatever Core ML reports for a model that it cannot plan
        return {}
    if program is None:
        return {}
    counted: Counter[str] = Counter()
    for function in program.functions.values():
        for operation in function.block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is not None:
                counted[DEVICES.get(type(usage.preferred_compute_device).__name__, "other")] += 1
    return dict(counted)


def content_key(package: Path) -> str:
    """A hash of a package's model and weights. Its Manifest.json is left out: it holds identifiers that are drawn
    anew at every save."""
    digest = hashlib.sha256()
    data = package / "Data"
    for file in sorted(path for path in data.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(data).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
