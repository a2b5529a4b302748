"""Runs ML Programs with torch on any OS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from diffusion_runtime.backends import ComputeUnits, TensorSpec, check_arrays
from diffusion_runtime.backends.interface import specs
from diffusion_runtime.errors import InputError, PackageError, UnsupportedError
from diffusion_runtime.mil.fuse import fuse
from diffusion_runtime.mil.lower import REFUSALS, lower, refusal
from diffusion_runtime.mil.memory_format import CHANNELS_LAST_DEVICES
from diffusion_runtime.mil.observe import ObserveRun, intermediates, observe_all
from diffusion_runtime.mil.package import Package, open_package
from diffusion_runtime.mil.program import FunctionInterface, Metadata

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """``dtype`` is the type of float arithmetic: float32 for everything, or bfloat16 or float16 for all but what a
    program of mixed precision keeps in float32.

    ``stream_weights`` leaves large weights in their file and widens each only while it is used: little memory, more
    time. ``fuse`` puts together what a converter took apart; without it every MIL value exists and can be watched.
    """

    dtype: str = "float32"
    device: str = "cpu"
    stream_weights: bool = False
    fuse: bool = True

    def load(
        self,
        path: Path,
        compute_units: ComputeUnits = ComputeUnits.ALL,  # noqa: ARG002
        function: str | None = None,
    ) -> TorchModel:
        """Load an .mlpackage, .mlmodel or .mlmodelc; ``compute_units`` mean nothing here. ``function``: which of
        several; None: the default one.

        Raises InputError (no such file, function or device), PackageError (damaged) or UnsupportedError (not
        covered).
        """
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        _check_device(self.device)
        package = open_package(path)
        if function is not None:
            package = package.of(function)
        interface = package.model.interface
        module = lower(
            package,
            dtype=DTYPES[self.dtype],
            device=self.device,
            stream_weights=self.stream_weights,
            channels_last=self.fuse and torch.device(self.device).type in CHANNELS_LAST_DEVICES,
        )
        if self.fuse:
            fuse(module)
        return TorchModel(
            path=path,
            inputs=specs(interface.inputs, path),
            outputs=specs(interface.outputs, path),
            metadata=package.model.metadata,
            module=module,
            device=self.device,
            order=_order(package, interface, module),
        )


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A loaded program. ``module`` takes tensors in ``order`` and gives a dict of tensors."""

    path: Path
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    metadata: Metadata
    module: fx.GraphModule
    device: str
    order: Sequence[tuple[str, torch.dtype]]

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Run once. Raises InputError for a missing, unknown or mis-shaped array."""
        tensors = self._tensors(arrays)
        try:
            with torch.inference_mode():
                return self._arrays(self.module(*tensors))
        except (*REFUSALS, UnsupportedError) as error:
            self._observed([tensors], None)  # op by op: the error of the one that fails
            raise PackageError(f"{self.path}: {refusal(error)}") from error

    def observe(self, watch: Callable[[str, str, Tensor], None], **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Run once and call ``watch(name, op, value)`` for every value that an op computes, in order."""
        (outputs,) = self.observe_all(lambda _, *value: watch(*value), [arrays])
        return outputs

    def observe_all(
        self, watch: ObserveRun | None, runs: Sequence[Mapping[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        """`observe` for several runs at once, each weight read once; ``watch`` takes the run's number first. None:
        nothing is watched."""
        found = self._observed([self._tensors(arrays) for arrays in runs], watch)
        return [self._arrays(outputs) for outputs in found]

    def intermediates(self, names: Sequence[str], **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Run once and give the values of the given MIL names. Raises InputError for names that do not exist."""
        found = intermediates(self.module, self._tensors(arrays), names)
        return {name: _to_numpy(value) for name, value in found.items()}

    def _observed(self, runs: Sequence[Sequence[Tensor]], watch: ObserveRun | None) -> list[dict[str, Tensor]]:
        try:
            return observe_all(self.module, runs, watch)
        except (PackageError, UnsupportedError) as error:
            raise type(error)(f"{self.path}: {error}") from error

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> list[Tensor]:
        check_arrays(self.inputs, arrays, self.path.name)
        return [
            # A copy only where it must be: torch takes no negative strides.
            torch.from_numpy(np.array(arrays[name], order="C", copy=None)).to(self.device, dtype)
            for name, dtype in self.order
        ]

    def _arrays(self, outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {name: _to_numpy(outputs[name]).astype(spec.dtype) for name, spec in self.outputs.items()}


def _to_numpy(value: Tensor) -> np.ndarray:
    plain = value.float() if value.dtype == torch.bfloat16 else value
    array: np.ndarray = plain.cpu().numpy()
    return array


def _order(package: Package, interface: FunctionInterface, module: fx.GraphModule) -> list[tuple[str, torch.dtype]]:
    name = interface.name if interface.name in package.model.program.functions else "main"
    names = [variable.name for variable in package.model.program.functions[name].inputs]
    return list(zip(names, module.meta["input_dtypes"], strict=True))


def _check_device(device: str) -> None:
    if device.partition(":")[0] not in DEVICES:
        raise InputError(f"device {device!r} cannot be used: expected one of {', '.join(DEVICES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise InputError(f"device {device!r} cannot be used here: {reason}") from error
