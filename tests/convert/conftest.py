"""A converted network for tests of what is done with packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


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
