"""Remembering what coremltools made changes nothing: the same bytes, and another network is converted anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import remembered
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export import export, placeholders
from diffusion_convert.export.trace import trace
from diffusion_convert.options import Precision
from diffusion_convert.palettize import palette, palettize_package
from diffusion_convert.palettize.outputs import seeded_inputs
from diffusion_convert.verification import compare
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.bundle.manifest import Folded
from diffusion_runtime.coremltools_import import import_messages
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.program import Metadata
from tiny_checkpoints import PNDM

OPTIONS = export.ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13")
pytestmark = pytest.mark.usefixtures("nothing_remembered")


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
            key: value.float() * scale if value.ndim > 1 else value
            for key, value in sorted(model.tensors().items(), reverse=scale != 1)
        }
        scaled = replace(
            checkpoint, models={**checkpoint.models, "text_encoder": replace(model, tensors=lambda: tensors)}
        )
        path = tmp_path / f"{name}.mlpackage"
        export.export(table()["text_encoder"], scaled, options, path, Metadata())
        return {name: next(path.rglob(name)).read_bytes() for name in ("model.mlmodel", "weight.bin")}

    traces = mock.Mock(side_effect=trace)
    monkeypatch.setattr(export, "trace", traces)
    plain, scaled = made("plain"), made("scaled", 0.5)
    assert plain != scaled
    calls = real.call_count
    with remembered.conversions(tmp_path / "kept"):
        assert made("first") == plain
        assert made("again") == plain and made("again scaled", 0.5) == scaled
        assert (real.call_count, traces.call_count) == (calls + 1, calls + 1)
        made("other", options=replace(OPTIONS, target="macOS15"))
        made("wide", options=replace(OPTIONS, precision=Precision.FLOAT32))
        beyond = made("beyond float16", 1e8)
        assert real.call_count == calls + 4
    assert made("beyond float16, really", 1e8) == beyond


def test_networks_that_are_the_same_are_built_once_whatever_else_is_other(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another family, or for another scheduler, with another VAE: their programs are the same, and what is
    written is."""
    monkeypatch.setattr(placeholders, "MIN_SIZE", 64)
    traces = mock.Mock(side_effect=trace)
    monkeypatch.setattr(export, "trace", traces)

    opened = {family: open_checkpoint(str(tiny_checkpoint(family))) for family in ("sd1", "sd1-inpainting")}
    other = {**opened["sd1"].schedulers["scheduler"], "prediction_type": "v_prediction"}
    models = {name: model for name, model in opened["sd1"].models.items() if name != "safety_checker"}
    models["vae"] = replace(models["vae"], config={**models["vae"].config, "scaling_factor": 0.5})
    opened["sd1-v"] = replace(opened["sd1"], schedulers={"scheduler": other}, models=models)

    def made(name: str, component: str, folder: str) -> bytes:
        path = tmp_path / folder / name / f"{component}.mlpackage"
        path.parent.mkdir(parents=True, exist_ok=True)
        export.export(table()[component], opened[name], OPTIONS, path, Metadata())
        return b"".join(next(path.rglob(name)).read_bytes() for name in ("model.mlmodel", "weight.bin"))

    parts = ("text_encoder", "vae_encoder", "vae_decoder")
    cases = [(family, part) for family in ("sd1", "sd1-inpainting") for part in parts]
    cases += [(scheduled, "unet") for scheduled in ("sd1", "sd1-v")]
    expected = [made(*case, "expected") for case in cases]
    before = traces.call_count
    with remembered.conversions(tmp_path / "kept"):
        assert [made(*case, "made") for case in cases] == expected
    assert traces.call_count == before + len(parts) + 1


def test_a_unets_program_is_that_of_what_it_is_built_of(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Its key is another where anything is that its inputs and outputs follow from, and they are those of the whole
    checkpoint."""
    unet, shape = table()["unet"], OPTIONS.shape
    plain, xl = (open_checkpoint(str(tiny_checkpoint(family))) for family in ("sd1", "sdxl"))

    def key(checkpoint: Checkpoint, shape: Shape = shape) -> str:
        built, narrow = remembered.built_of(unet, checkpoint, shape)
        whole, part = (
            unet.build(of, OPTIONS.attention, size) for of, size in ((checkpoint, shape), (built, narrow))
        )
        assert (whole.inputs, whole.outputs, whole.exact) == (part.inputs, part.outputs, part.exact)
        assert whole.description == part.description
        return remembered.program_key(unet, built, replace(OPTIONS, shape=narrow))

    def other(of: Checkpoint, name: str, **config: Any) -> Checkpoint:
        changed = replace(of.models[name], config={**of.models[name].config, **config})
        return replace(of, models={**of.models, name: changed})

    text, vae = "text_encoder", plain.models["vae"].config["block_out_channels"]
    same = (other(plain, "vae", scaling_factor=0.5), other(plain, text, num_hidden_layers=1))
    assert {key(one) for one in same} | {key(plain, replace(shape, context_length=77))} == {key(plain)}
    noise = Folded(prediction_type="v_prediction")
    others = (
        other(plain, "vae", block_out_channels=vae[1:]),
        other(plain, text, max_position_embeddings=50),
        other(plain, "unet", norm_eps=1e-6),
        replace(plain, folded=noise),
        replace(plain, folded=noise, schedulers={"scheduler": {**PNDM, "beta_end": 0.02}}),
        other(xl, "text_encoder_2", projection_dim=16),
        xl,
    )
    keys = [key(plain), *map(key, others), *(key(plain, replace(shape, height=size)) for size in (96, 128))]
    assert len(set(keys)) == len(keys)
    kept, of = (table()["safety_checker"], plain), remembered.narrowed
    assert of(*kept, shape)[1] == of(*kept, replace(shape, batch_size=1))[1] != of(*kept, Shape(96, 64, 2))[1]


def test_what_has_no_placeholder_is_part_of_it(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The checker's thresholds and concepts are computed with while it is built: found, and found again."""
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    model = checkpoint.models["safety_checker"]
    moved = {name: value + 1.0 if "care" in name else value for name, value in model.tensors().items()}
    other = replace(model, tensors=lambda: moved)

    def made(name: str, of: Checkpoint) -> bytes:
        export.export(table()["safety_checker"], of, OPTIONS, tmp_path / name, Metadata())
        return b"".join(
            path.read_bytes() for path in sorted((tmp_path / name / "Data").rglob("*.*")) if path.is_file()
        )

    (tmp_path / "kept").mkdir()
    changed = replace(checkpoint, models={**checkpoint.models, "safety_checker": other})
    expected = made("plain", checkpoint), made("changed", changed)
    assert expected[0] != expected[1]
    with remembered.conversions(tmp_path / "kept"):
        for number in range(2):
            assert (made(f"plain-{number}", checkpoint), made(f"changed-{number}", changed)) == expected


def test_what_a_network_computes_is_of_its_weights(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    model = checkpoint.models["vae"]
    moved = {name: value + 1.0 for name, value in model.tensors().items()}
    changed = replace(checkpoint, models={**checkpoint.models, "vae": replace(model, tensors=lambda: moved)})
    expected = compare.Expected(({"x": np.zeros(1)},), ({"y": np.ones(1)},))

    def asked(component: str, of: Checkpoint, height: int = 64) -> int:
        found = compare.reference(table()[component], of, Shape(height, 64, 2), lambda _: None)
        assert found.outputs[0]["y"] == 1.0
        calls: int = real.call_count
        return calls

    with mock.patch.object(compare, "reference", return_value=expected) as real:
        real.__wrapped__ = real
        with remembered.conversions(tmp_path):
            counts = [
                asked(*given)
                for given in (
                    ("vae_decoder", checkpoint),
                    ("vae_decoder", replace(checkpoint, name="other")),
                    ("vae_encoder", checkpoint),
                    ("vae_decoder", changed),
                    ("vae_decoder", checkpoint, 96),
                    ("vae_decoder", changed),
                )
            ]
    assert counts == [1, 1, 2, 3, 4, 4]


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


def test_entries_are_looked_for_once_and_are_those_that_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other values, other frequencies, another number of entries or type, they are others."""
    values = np.sort(np.random.default_rng(1).normal(size=200))
    first = palette.Problem(values, np.ones(200), 4, np.dtype(np.float16))
    others = [
        replace(first, values=values * 2),
        replace(first, counts=np.arange(1.0, 201.0)),
        replace(first, count=8),
        replace(first, dtype=np.dtype(np.float32)),
    ]
    expected = palette.best_entries([first, *others])
    find = mock.Mock(side_effect=palette.best_entries)
    monkeypatch.setattr(palette, "best_entries", find)
    with remembered.conversions(tmp_path / "kept"):
        remembering = vars(palettize_package)["best_entries"]
        found = remembering([first]) + remembering([*others, first])
    for ours, theirs in zip(found, [*expected, expected[0]], strict=True):
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    assert [len(call.args[0]) for call in find.call_args_list] == [1, 4]
