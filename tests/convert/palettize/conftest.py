"""Small packages to palettize, converted once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_runtime.coremltools_import import import_coremltools


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_package("iOS18", precision="FLOAT32")``: a package with a layer of each kind; shared."""
    written: dict[tuple[str, str], Path] = {}

    def package(target: str = "iOS16", precision: str = "FLOAT16") -> Path:
        key = (target, precision)
        if key not in written:
            path = tmp_path_factory.mktemp("packages") / f"{target}-{precision}.mlpackage"
            _convert(target, precision).save(str(path))
            written[key] = path
        return written[key]

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


@pytest.fixture(scope="session")
def tiny_unet(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The UNet of the tiny SD 1 checkpoint, converted for macOS 13."""
    from diffusion_convert.checkpoint.diffusers_folder import open_folder
    from diffusion_convert.components.component import Shape
    from diffusion_convert.components.unet import UNET
    from diffusion_convert.export.export import ExportOptions, export
    from diffusion_runtime.bundle.manifest import Source
    from diffusion_runtime.families import AttentionKind
    from diffusion_runtime.mil.program import Metadata

    path = tmp_path_factory.mktemp("unet") / "unet.mlpackage"
    checkpoint = open_folder(tiny_checkpoint("sd1"), Source(name="tiny"))
    export(UNET, checkpoint, ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13"), path, Metadata())
    return path
