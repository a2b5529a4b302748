"""Packages for tests of what is done with them, each made once per run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_runtime.coremltools_import import import_coremltools


@pytest.fixture
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def tiny_unet(tiny_checkpoint: Callable[[str], Path], build_once: Callable[..., Path]) -> Path:
    """The UNet of the tiny SD 1 checkpoint, converted for macOS 13; shared."""
    name = "unet.mlpackage"
    return build_once("tiny-unet", lambda to: _export_unet(tiny_checkpoint("sd1"), to / name)) / name


def _export_unet(source: Path, path: Path) -> None:
    from diffusion_convert.checkpoint.diffusers_folder import open_folder
    from diffusion_convert.components.component import Shape
    from diffusion_convert.components.unet import UNET
    from diffusion_convert.export.export import ExportOptions, export
    from diffusion_runtime.bundle.manifest import Source
    from diffusion_runtime.families import AttentionKind
    from diffusion_runtime.mil.program import Metadata

    checkpoint = open_folder(source, Source(name="tiny"))
    export(UNET, checkpoint, ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13"), path, Metadata())


@pytest.fixture(scope="session")
def tiny_package(build_once: Callable[..., Path]) -> Callable[..., Path]:
    """``tiny_package("iOS18", precision="FLOAT32")``: a package with a layer of each kind; shared."""

    def package(target: str = "iOS16", precision: str = "FLOAT16") -> Path:
        name = f"{target}-{precision}.mlpackage"
        return build_once(name, lambda to: _convert(target, precision).save(str(to / name))) / name

    return package


def _convert(target: str, precision: str) -> Any:
    """conv, conv_transpose, linear, matmul and gather with 2,048 elements and more, and one conv with fewer."""
    ct = import_coremltools()
    builder = import_coremltools("converters.mil").Builder
    random = np.random.default_rng(3)

    def weight(*shape: int) -> np.ndarray:
        values: np.ndarray = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return values.astype(np.float32)

    @builder.program(  # type: ignore[untyped-decorator]
        input_specs=[
            builder.TensorSpec(shape=(1, 8, 16, 16)),
            builder.TensorSpec(shape=(1, 5), dtype=import_coremltools("converters.mil.mil").types.int32),
        ],
        opset_version=getattr(ct.target, target),
    )
    def network(x: Any, ids: Any) -> Any:
        small = builder.conv(x=x, weight=weight(8, 8, 3, 3), pad_type="same", name="small")
        wide = builder.conv(x=small, weight=weight(48, 8, 3, 3), bias=weight(48), pad_type="same", name="wide")
        wide = builder.silu(x=wide)
        half = builder.conv_transpose(x=wide, weight=weight(48, 16, 2, 2), strides=[2, 2], name="up")
        rows = builder.linear(x=half, weight=weight(64, 32), bias=weight(64), name="rows")
        found = builder.gather(x=weight(70, 32), indices=ids, axis=0, name="embedded")
        return builder.matmul(x=rows, y=weight(64, 48), name="mixed"), found

    return ct.convert(
        network,
        convert_to="mlprogram",
        minimum_deployment_target=getattr(ct.target, target),
        compute_precision=getattr(ct.precision, precision),
        skip_model_load=True,
    )
