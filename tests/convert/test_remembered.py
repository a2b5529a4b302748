"""Remembering what coremltools made changes nothing: the same bytes, and another network is converted anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import remembered
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export import export, placeholders
from diffusion_convert.options import Precision
from diffusion_convert.palettize.outputs import seeded_inputs
from diffusion_convert.verification import compare
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.coremltools_import import import_messages
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.program import Metadata

OPTIONS = export.ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13")
pytestmark = pytest.mark.usefixtures("coremltools_itself")


def test_a_package_has_the_same_bytes(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever checkpoint it was first converted of: its weights are those of the checkpoint at hand."""
    monkeypatch.setattr(placeholders, "MIN_SIZE", 64)
    real = mock.Mock(side_effect=export._convert)
    monkeypatch.setattr(export, "_convert", real)
    (tmp_path / "kept").mkdir()

    def made(name: str, scale: float = 1.0, options: export.ExportOptions = OPTIONS) -> dict[str, bytes]:
        checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
        model = checkpoint.models["text_encoder"]
        tensors = {
            key: value.float() * scale if value.ndim > 1 else value for key, value in model.tensors().items()
        }
        scaled = replace(
            checkpoint, models={**checkpoint.models, "text_encoder": replace(model, tensors=lambda: tensors)}
        )
        path = tmp_path / f"{name}.mlpackage"
        export.export(table()["text_encoder"], scaled, options, path, Metadata())
        return {name: next(path.rglob(name)).read_bytes() for name in ("model.mlmodel", "weight.bin")}

    plain, scaled = made("plain"), made("scaled", 0.5)
    assert plain != scaled
    calls = real.call_count
    with remembered.conversions(tmp_path / "kept"):
        assert made("first") == plain
        assert made("again") == plain and made("again scaled", 0.5) == scaled
        assert real.call_count == calls + 1
        made("other", options=replace(OPTIONS, target="macOS15"))
        made("wide", options=replace(OPTIONS, precision=Precision.FLOAT32))
        beyond = made("beyond float16", 1e8)
        assert real.call_count == calls + 4
    assert made("beyond float16, really", 1e8) == beyond


def test_a_verdict_is_of_program_weights_and_inputs(tiny_unet: Path, tmp_path: Path) -> None:
    """Another description is the same; anything else is measured anew."""
    inputs = seeded_inputs(TorchBackend().load(tiny_unet).inputs, 1)
    first = tuple({name: np.zeros((2, 4, 8, 8), np.float32) for name in ("noise_pred",)} for _ in inputs)
    expected = compare.Expected(tuple(inputs), first)
    other = replace(expected, inputs=tuple({name: array + 1 for name, array in run.items()} for run in inputs))
    described, changed = (shutil.copytree(tiny_unet, tmp_path / f"{name}.mlpackage") for name in ("a", "b"))
    specification = next(described.rglob("model.mlmodel"))
    model = import_messages("Model_pb2").Model.FromString(specification.read_bytes())
    model.description.metadata.shortDescription = "another"
    specification.write_bytes(model.SerializeToString())
    weights = next(changed.rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    verdict = compare.Verdict({"noise_pred": 1.0}, {}, ())
    with mock.patch.object(compare, "_measure", return_value=verdict) as real, remembered.conversions(tmp_path):
        for path, against in ((tiny_unet, expected), (tiny_unet, expected), (described, expected)):
            assert compare.measure(path, against, lambda _: None) == verdict
        assert real.call_count == 1
        compare.measure(changed, expected, lambda _: None)
        compare.measure(tiny_unet, other, lambda _: None)
        assert real.call_count == 3
