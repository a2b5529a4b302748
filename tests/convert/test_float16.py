"""Operations that become float16 as they stand are those that coremltools' own pass makes, whatever it is told to
leave in float32."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export import coremltools_patches, export
from diffusion_convert.export.export import ExportOptions, mil_name
from diffusion_convert.export.float16 import in_place
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import Metadata

pytestmark = pytest.mark.usefixtures("nothing_remembered")

Apply = Callable[[Any, Any], None]


@pytest.mark.parametrize(
    ("family", "component", "attention", "target", "share"),
    [
        ("sd1", "unet", AttentionKind.ORIGINAL, "macOS13", 3),
        ("sd1", "unet", AttentionKind.ORIGINAL, "macOS15", 2),
        ("sd1-odd", "text_encoder", AttentionKind.SPLIT_EINSUM, "iOS17", 3),
        ("sd2-inpainting", "text_encoder", AttentionKind.SPLIT_EINSUM_V2, "macOS13", 3),
        ("sd1", "vae_encoder", AttentionKind.ORIGINAL, "macOS14", 1),
    ],
)
def test_programs_are_coremltools_own(
    family: str,
    component: str,
    attention: AttentionKind,
    target: str,
    share: int,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but each ``share``-th operation become float16, by their names; with 1 all."""

    def some(operation: Any) -> bool:
        return share == 1 or zlib.crc32(mil_name(operation.name).encode()) % share > 0

    monkeypatch.setattr(export, "_precision", lambda ct, *_: ct.transform.FP16ComputePrecision(op_selector=some))
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    options = ExportOptions(attention, Shape(64, 64, 2), target)
    made = {}
    for name, passed in (("ours", in_place), ("theirs", _as_it_is)):
        path = tmp_path / f"{name}.mlpackage"
        with mock.patch.object(coremltools_patches, "in_place", passed):
            exported = export.export(table()[component], checkpoint, options, path, Metadata())
        told = exported.modules, exported.precision, exported.float32_weights
        made[name] = (
            open_package(path).model,
            told,
            (path / "Data/com.apple.CoreML/weights/weight.bin").read_bytes(),
        )
    assert made["ours"] == made["theirs"]
    casts = sum(operation.type == "cast" for operation in made["ours"][0].function.block.operations)
    assert casts > 20 or share == 1


def _as_it_is(original: Apply) -> Apply:
    return original


def test_ends_and_small_constants() -> None:
    """An output that is used inside too, whole numbers among the outputs, and what would become zero."""
    assert _program(in_place) == _program(_as_it_is)


def _program(passed: Callable[[Apply], Apply]) -> list[tuple[Any, ...]]:
    builder = import_coremltools("converters.mil.mil").Builder
    choice = import_coremltools("converters.mil.mil.passes.defs.quantization").FP16ComputePrecision

    @builder.program(input_specs=[builder.TensorSpec(shape=(2, 4))])  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        tiny = builder.add(x=x, y=np.array([1e-12, -1e-12, 0.5, 0.0], np.float32), name="tiny")
        order = builder.reduce_argmax(x=tiny, axis=1, name="order")
        halves = builder.split(x=builder.mul(x=tiny, y=tiny, name="square"), num_splits=2, axis=1, name="halves")
        kept = builder.exp(x=halves[1], name="kept")
        wide = builder.exp(x=halves[1], name="wide")
        known = builder.mul(x=np.float32(1e-9), y=np.array([1.0, 2.0], np.float32), name="wide_known")
        ends = builder.add(x=halves[0], y=kept, name="sum"), builder.mul(x=halves[0], y=known, name="known")
        return tiny, order, *ends, kept, wide, halves[1], halves[0]

    with mock.patch.object(choice, "apply", passed(choice.apply)):
        choice(op_selector=lambda operation: not operation.name.startswith(("kept", "wide")))(program)
    for name in ("const_elimination", "dead_code_elimination", "cast_optimization", "dead_code_elimination"):
        import_coremltools("converters.mil.mil.passes.pass_registry").PASS_REGISTRY[f"common::{name}"](program)
    function = program.functions["main"]
    found = [
        (operation.op_type, *map(str, operation.outputs), *map(_told, operation.get_flattened_inputs()))
        for operation in function.operations
        if operation.op_type != "const"
    ]
    return [*found, *(output.name for output in function.outputs)]


def _told(variable: Any) -> object:
    """A constant's value, else a name."""
    return variable.name if variable.val is None else (np.asarray(variable.val).dtype.str, str(variable.val))
