"""Lean conversion gives what coremltools alone gives, and leaves coremltools as it was."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export import coremltools_patches
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.export.placeholders import Placeholders
from diffusion_convert.export.trace import trace
from diffusion_convert.networks import teach_coremltools
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.package import Package, open_package
from diffusion_runtime.mil.program import Blob, Metadata, Value, operations

pytestmark = pytest.mark.usefixtures("nothing_remembered")

# Not of a split kind: those are split after coremltools, which test_split_attention.py is about.
RECIPE = ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13")


@pytest.fixture(params=["text_encoder", "vae_encoder"])
def packages(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> tuple[Package, Package]:
    """One component, converted by us, and by coremltools alone from the network with its weights."""
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    component = table()[request.param]
    export(component, checkpoint, RECIPE, tmp_path / "ours.mlpackage", Metadata())
    graph = component.build(checkpoint, RECIPE.attention, RECIPE.shape)
    graph.module.float()
    ct = import_coremltools()
    teach_coremltools()
    with torch_networks.silent():
        ct.convert(
            trace(graph),
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.macOS13,
            inputs=[ct.TensorType(port.name, port.shape, np.dtype(port.dtype)) for port in graph.inputs],
            outputs=[ct.TensorType(port.name, dtype=np.dtype(port.dtype)) for port in graph.outputs],
            skip_model_load=True,
        ).save(str(tmp_path / "theirs.mlpackage"))
    return open_package(tmp_path / "ours.mlpackage"), open_package(tmp_path / "theirs.mlpackage")


def test_program_and_weights_are_coremltools_own(packages: tuple[Package, Package]) -> None:
    ours, theirs = ([described(package, op) for op in block(package)] for package in packages)
    assert len(ours) > 50
    for one, two in zip(ours, theirs, strict=True):
        assert one == two


def block(package: Package) -> Iterator[Any]:
    yield from operations(package.model.program.functions["main"].block)


def described(package: Package, operation: Any) -> tuple[Any, ...]:
    """An operation with its constants' values in place of where they are stored."""
    stored = operation.attributes.get("val")
    value = array(package, stored) if operation.type == "const" else None
    return operation.type, dict(operation.inputs), operation.outputs, value


def array(package: Package, value: Value) -> object:
    if isinstance(value.data, (Blob, np.ndarray)):
        found = package.array(value)
        return found.dtype.str, found.shape, found.tobytes()
    return value.data


REPLACED = {
    "validation": ("converters.mil.mil.passes.pass_pipeline", "PassPipelineManager", "apply_pipeline"),
    "overflow": ("converters.mil.mil.passes.defs.quantization", "FP16ComputePrecision", "fp16_overflow"),
    "underflow": (
        "converters.mil.mil.passes.defs.quantization",
        "FP16ComputePrecision",
        "_check_underflow_to_zero",
    ),
    "duplicates": (
        "converters.mil.mil.passes.defs.cleanup.const_deduplication",
        "const_deduplication",
        "should_be_deduplicated",
    ),
    "float16": ("converters.mil.mil.passes.defs.quantization", "FP16ComputePrecision", "apply"),
    "cast": ("converters.mil.mil.ops.defs.iOS15.elementwise_unary", "cast", "get_cast_value"),
    "constants": ("converters.mil.mil.ops.defs.iOS15.control_flow", "Const", "_get_type_val"),
    "scope": ("converters.mil.frontend.torch.internal_graph", "InternalTorchIRNode", "from_torchscript_node"),
    "types": ("converters.mil.mil.types", "type_mapping", "get_type_info"),
    "print": ("converters.mil.mil.block", "Function", "__str__"),
    "scopes": ("converters.mil.mil.var", "Var", "scopes"),
    "transposes": (
        "converters.mil.mil.passes.defs.optimize_repeat_ops",
        "_TransposeOptimization",
        "apply_transform",
    ),
    "nonreplaceable": ("converters.mil.mil.block", "Block", "_propagate_nonreplaceable_vars"),
}


@pytest.mark.parametrize(("module", "owner", "name"), REPLACED.values(), ids=REPLACED)
def test_everything_is_put_back(module: str, owner: str, name: str) -> None:
    place = getattr(import_coremltools(module), owner)
    before = inspect.getattr_static(place, name)
    with pytest.raises(RuntimeError), coremltools_patches.patched_coremltools(Placeholders(), lambda _: 0):
        assert inspect.getattr_static(place, name) is not before
        raise RuntimeError
    assert inspect.getattr_static(place, name) is before


@pytest.mark.parametrize(
    "name",
    [
        *("_passes", "_overflow", "_underflow", "_small", "_cast", "_placed", "_equal", "_remembered"),
        *("_cancelled", "_once", "in_place"),
    ],
)
def test_every_replacement_is_used(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A release of coremltools that calls something else would make the replacement useless, without an error."""
    called: list[str] = []
    make = getattr(coremltools_patches, name)

    def watched(*arguments: Any) -> Callable[..., Any]:
        function = make(*arguments)

        def call(*given: Any, **named: Any) -> Any:
            called.append(name)
            return function(*given, **named)

        return call

    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    with mock.patch.object(coremltools_patches, name, watched):
        export(table()["text_encoder"], checkpoint, RECIPE, tmp_path / "model.mlpackage", Metadata())
    assert called


def test_temporary_files_are_made_where_the_package_is(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process leaves elsewhere stays for ever."""
    elsewhere, made = tmp_path / "elsewhere", tmp_path / "made"
    elsewhere.mkdir()
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    seen: list[str] = []
    mkdtemp = tempfile.mkdtemp

    def watched(*arguments: Any, **named: Any) -> str:
        seen.append(mkdtemp(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", watched)
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    export(table()["text_encoder"], checkpoint, RECIPE, made / "a.mlpackage", Metadata())
    assert seen
    assert [path for path in seen if not Path(path).is_relative_to(made)] == []
    assert list(elsewhere.glob("tmp*")) == []
    assert [path.name for path in made.iterdir()] == ["a.mlpackage"]
