"""Small programs written with coremltools' builder, saved as packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_runtime.coremltools_import import import_coremltools

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _loaded_anew(loaded_anew: None) -> None:
    """Loading is what these tests are of."""


@pytest.fixture(scope="session")
def save_program(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """``save(body, x=(2, 3))`` writes a package whose function body is ``body(builder, **inputs)``. No pass of
    coremltools rewrites it."""

    def save(body: Callable[..., Any], dtype: str = "fp32", **shapes: tuple[int, ...]) -> Path:
        ct = import_coremltools()
        mil = import_coremltools("converters.mil.mil")
        types = import_coremltools("converters.mil.mil.types")
        of = types.string_to_builtin(dtype)
        inputs = {name: mil.Builder.placeholder(shape, of) for name, shape in shapes.items()}
        program = mil.Program()
        with mil.Function(inputs, opset_version=ct.target.iOS16) as function:
            outputs = body(mil.Builder, *function.inputs.values())
            function.set_outputs(list(outputs) if isinstance(outputs, tuple | list) else [outputs])
            program.add_function("main", function)
        options = {"minimum_deployment_target": ct.target.iOS16, "skip_model_load": True}
        pipeline = ct.PassPipeline.EMPTY
        model = ct.convert(program, convert_to="mlprogram", pass_pipeline=pipeline, **options)
        path = tmp_path_factory.mktemp("program") / "model.mlpackage"
        model.save(str(path))
        return path

    return save


@pytest.fixture(scope="session")
def network(save_program: Save) -> Path:
    """x (1, 4, 6, 6) -> conv, relu, add of a scalar, mean: with one weight in the weight file."""
    weight = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)

    def body(mb: Any, x: Any) -> Any:
        features = mb.conv(x=x, weight=mb.const(val=weight, name="weight"), name="features")
        positive = mb.relu(x=features, name="positive")
        return mb.reduce_mean(x=mb.add(x=positive, y=np.float32(2), name="shifted"), axes=[2, 3], name="pooled")

    return save_program(body, x=(1, 4, 6, 6))
