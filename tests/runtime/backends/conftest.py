# ruff: noqa: ARG002  (the stand-in's signatures are coremltools')
"""Small packages made by coremltools, and a stand-in for the part of coremltools that needs macOS."""

from __future__ import annotations

import enum
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusion_runtime.coremltools_import import import_coremltools


@pytest.fixture(autouse=True)
def _loaded_anew(loaded_anew: None) -> None:
    """Loading is what these tests are of."""


class ComputeUnit(enum.Enum):
    """As coremltools.ComputeUnit."""

    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


@dataclass
class StandIn:
    """Records what is asked of coremltools. ``answers`` is what predictions return; ``fails`` names a call that
    raises."""

    answers: dict[str, np.ndarray] = field(default_factory=dict)
    fails: str = ""
    compiled: list[str] = field(default_factory=list)
    opened: list[tuple[str, str, str]] = field(default_factory=list)
    functions: list[str | None] = field(default_factory=list)
    predictions: list[dict[str, np.ndarray]] = field(default_factory=list)

    def module(self) -> Any:
        """What `import_coremltools()` returns on macOS, as far as the backend uses it."""
        stand_in = self

        class _Model:
            def _open(self, kind: str, path: str, units: ComputeUnit, function: str | None) -> None:
                assert isinstance(path, str) and isinstance(units, ComputeUnit)
                assert function is None or isinstance(function, str)
                stand_in.raise_if("load")
                stand_in.functions.append(function)
                stand_in.opened.append((kind, path, units.name))

            def predict(self, data: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
                stand_in.raise_if("predict")
                stand_in.predictions.append(data)
                return stand_in.answers

        class MLModel(_Model):
            def __init__(
                self,
                model: str,
                is_temp_package: bool = False,
                mil_program: Any = None,
                skip_model_load: bool = False,
                compute_units: ComputeUnit = ComputeUnit.ALL,
                weights_dir: Any = None,
                function_name: Any = None,
                optimization_hints: Any = None,
            ) -> None:
                self._open("package", model, compute_units, function_name)

        class CompiledMLModel(_Model):
            def __init__(
                self,
                path: str,
                compute_units: ComputeUnit = ComputeUnit.ALL,
                function_name: Any = None,
                optimization_hints: Any = None,
                asset: Any = None,
            ) -> None:
                assert Path(path).is_dir()
                self._open("compiled", path, compute_units, function_name)

        def compile_model(model: str, destination_path: str | None = None) -> str:
            stand_in.raise_if("compile")
            assert destination_path is not None and model.endswith(".mlpackage")
            stand_in.compiled.append(model)
            shutil.copytree(model, destination_path)
            return destination_path

        models = SimpleNamespace(
            MLModel=MLModel, CompiledMLModel=CompiledMLModel, utils=SimpleNamespace(compile_model=compile_model)
        )
        return SimpleNamespace(ComputeUnit=ComputeUnit, models=models)

    def raise_if(self, call: str) -> None:
        if self.fails == call:
            raise Exception(f"Error Domain=com.apple.CoreML: {call} failed\nsecond line")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """macOS with coremltools, as the backend sees it."""
    stand_in = StandIn(answers={"y": np.zeros((2, 64), np.float32)})
    module = stand_in.module()
    monkeypatch.setattr("diffusion_runtime.backends.coreml.import_coremltools", lambda: module)
    monkeypatch.setattr("diffusion_runtime.backends.coreml.platform.system", lambda: "Darwin")
    return stand_in


@pytest.fixture(scope="session")
def small_package(build_once: Callable[..., Path]) -> Path:
    """``y = x @ w`` with x of (2, 64) float16, as an .mlpackage; shared."""
    return build_once("small-package", lambda to: _save_product(to / "small.mlpackage")) / "small.mlpackage"


def _save_product(path: Path) -> None:
    coremltools = import_coremltools()
    builder = import_coremltools("converters.mil").Builder
    types = import_coremltools("converters.mil.mil.types")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)

    @builder.program(  # type: ignore[untyped-decorator]
        input_specs=[builder.TensorSpec((2, 64), dtype=types.fp16)], opset_version=coremltools.target.iOS16
    )
    def program(x: Any) -> Any:
        return builder.matmul(x=x, y=weight, name="y")

    model = coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=coremltools.precision.FLOAT16,
        skip_model_load=True,
    )
    model.save(str(path))
