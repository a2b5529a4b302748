"""What exports make of a network, what it computes itself, what comes of running a package and the entries of
palettes, kept for the length of a run.

They take most of the time of a conversion, and most conversions of the tests are of a network that another test has
converted. Weights are no part of a program, but for what the network is traced with: it is built, traced and
converted with placeholders. They are written anew each time, from the checkpoint at hand. A program is known by the
configurations that it is built from, without it being built, or else by its trace, as many configurations have the
same. Of the others weights are a part: the same program with the same weights computes the same of the same inputs.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest import mock

import numpy as np
import torch

from diffusion_convert import components
from diffusion_convert.checkpoint.family import text_length
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.components.component import Component, Graph, Shape
from diffusion_convert.export import export, placeholders
from diffusion_convert.export.placeholders import Misplaced, Placeholders, thin
from diffusion_convert.palettize import palette, palettize_package, recipe
from diffusion_convert.palettize.damage import Damage, measure_damage
from diffusion_convert.palettize.palette import Entries, Problem
from diffusion_convert.verification import compare
from diffusion_runtime.bundle.manifest import Folded
from diffusion_runtime.coremltools_import import import_messages
from diffusion_runtime.families import COMPONENTS, FAMILIES, TEXT_ENCODERS, kind_of
from diffusion_runtime.mil import proto
from diffusion_runtime.mil.weights import WeightWriter

Measure = Callable[..., compare.Verdict]
Refer = Callable[..., compare.Expected]
Made = TypeVar("Made")
ANY = Shape(64, 64, 1)
"""What is converted for any size."""
VAES = ("vae_decoder", "vae_encoder", "preview_vae_decoder")
MOST_PROGRAMS = 32
"""So many that were read are in memory. They are not changed by anything: who rewrites one makes another."""


@dataclass(frozen=True)
class Kept(Generic[Made]):
    """``constants``: what was written to the weight file, in order, without repetitions, and its shape.
    ``exceeding``: the placeholders whose weights were asked whether they exceed float16, and the answers, which
    decide what stays in float32."""

    made: Made
    constants: list[tuple[np.ndarray, tuple[int, ...]]]
    exceeding: dict[int, bool]


@contextmanager
def conversions(folder: Path) -> Iterator[None]:
    """In this context, exports look in ``folder`` before they call coremltools, and verification before it runs.
    Weights as small as the tests' have placeholders, as if they had the sizes of real ones."""
    folder.mkdir(exist_ok=True)
    told = ("trace", "convert")
    with (
        mock.patch.object(placeholders, "MIN_SIZE", 64),
        mock.patch.object(export, "_program", _remembering(export._program, program_key, folder, told)),
        mock.patch.object(export, "_convert", _remembering(export._convert, trace_key, folder)),
        mock.patch.object(export, "trace", _alone(vars(export)["trace"])),
        mock.patch.object(compare, "reference", _referring(compare.reference, folder)),
        mock.patch.object(compare, "_measure", _measuring(compare._measure, folder)),
        mock.patch.object(recipe, "measure_damage", _damaging(measure_damage, folder)),
        mock.patch.object(palettize_package, "best_entries", _finding(palette.best_entries)),
        mock.patch.object(proto, "model_from_bytes", lru_cache(MOST_PROGRAMS)(proto.model_from_bytes)),
    ):
        yield


def _keep(value: object, path: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.replace(path)


def _kept(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.is_file() else None  # noqa: S301 (our own)


def _remembering(
    make: Callable[..., Made], key: Callable[..., str], folder: Path, phases: Sequence[str] = ()
) -> Callable[..., Made]:
    """``make`` takes what ``key`` takes, and then what it writes to. ``phases`` are those that it tells of."""

    @wraps(make)
    def remembering(*given: Any) -> Made:
        *known, placeholders, writer, clock = given
        if isinstance(known[0], Component):
            if not _is_ours(known[0]):
                return make(*given)
            known[1], size = built_of(known[0], known[1], known[2].shape)
            known[2] = replace(known[2], shape=size)
        path = folder / key(*known)
        kept: Kept[Made] | frozenset[str] | None = _kept(path)
        if isinstance(kept, frozenset):
            raise Misplaced("as before", kept)
        if kept and all(placeholders.exceeds_float16(index) == is_so for index, is_so in kept.exceeding.items()):
            for phase in phases:
                clock.start(phase)
            for array, shape in kept.constants:
                export.write_constant(placeholders, writer, np.broadcast_to(array, shape))
            return kept.made
        constants: list[tuple[np.ndarray, tuple[int, ...]]] = []

        def write(placeholders: Placeholders, writer: WeightWriter, array: np.ndarray) -> int:
            constants.append((np.array(thin(array)), array.shape))
            return written(placeholders, writer, array)

        written = export.write_constant
        with mock.patch.object(export, "write_constant", write):
            try:
                made = make(*known, placeholders, writer, clock)
            except Misplaced as misplaced:
                _keep(misplaced.names, path)
                raise
        _keep(Kept(made, constants, dict(placeholders._exceeding)), path)
        return made

    return remembering


def _alone(trace: Callable[..., Any]) -> Callable[..., Any]:
    """In a thread of its own: with each operation, the tracer writes down all functions that it is called from, and
    those of pytest alone take half as long as the rest."""

    @wraps(trace)
    def alone(*given: Any) -> Any:
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(trace, *given).result()

    return alone


def _referring(refer: Refer, folder: Path) -> Refer:
    @wraps(refer)
    def referring(
        component: Component, checkpoint: Checkpoint, shape: Shape, progress: compare.OnFraction
    ) -> compare.Expected:
        if not _is_ours(component):
            return refer(component, checkpoint, shape, progress)
        checkpoint, shape = narrowed(component, checkpoint, shape)
        told = _told(component, checkpoint, shape)
        for model in checkpoint.models.values():  # inputs are drawn with other networks' help
            for name, tensor in model.tensors().items():
                told.update(name.encode())
                _tell(told, tensor)
        path = folder / told.hexdigest()
        expected: compare.Expected | None = _kept(path)
        if expected is None:
            expected = refer(component, checkpoint, shape, progress)
            _keep(expected, path)
        progress(1.0)
        return expected

    return referring


def _measuring(measure: Measure, folder: Path) -> Measure:
    @wraps(measure)
    def measuring(
        package: Path, expected: compare.Expected, progress: compare.OnFraction, passes: Sequence[Any]
    ) -> compare.Verdict:
        path = folder / verdict_key(package, expected, passes)
        verdict: compare.Verdict | None = _kept(path)
        progress(0.0)
        progress(1.0)
        if verdict is not None:
            return verdict
        verdict = measure(package, expected, progress, passes)
        _keep(verdict, path)
        return verdict

    return measuring


def _damaging(measure: Callable[..., Damage], folder: Path) -> Callable[..., Damage]:
    @wraps(measure)
    def damaging(package: Path, *given: Any) -> Damage:
        path = folder / _told_of(package, given).hexdigest()
        damage: Damage | None = _kept(path)
        if damage is None:
            damage = measure(package, *given)
            _keep(damage, path)
        return damage

    return damaging


def _finding(find: Entries) -> Entries:
    """In this process: the same values, as often, have the same entries."""
    known: dict[tuple[bytes, int, np.dtype], np.ndarray] = {}

    @wraps(find)
    def finding(problems: Sequence[Problem]) -> list[np.ndarray]:
        keys = [
            (hashlib.sha256(one.values.tobytes() + one.counts.tobytes()).digest(), one.count, one.dtype)
            for one in problems
        ]
        new = {key: one for key, one in zip(keys, problems, strict=True) if key not in known}
        known.update(zip(new, find(list(new.values())), strict=True))
        return [known[key] for key in keys]

    return finding


def verdict_key(package: Path, expected: compare.Expected, passes: Sequence[Any]) -> str:
    """Of everything that the package computes from, and what it is compared with."""
    told = _told_of(package, [one.__qualname__ for one in passes])
    for run in (*expected.inputs, *expected.outputs):
        for name, array in sorted(run.items()):
            told.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return str(told.hexdigest())


def _told_of(package: Path, asked: object) -> Any:
    """A hash of a package and of what is asked of it. Not of its description, which has the checkpoint's name."""
    model = import_messages("Model_pb2").Model()
    told = hashlib.sha256(repr(asked).encode())
    for file in sorted(path for path in (package / "Data").rglob("*") if path.is_file()):
        data = file.read_bytes()
        if file.suffix == ".mlmodel":
            model.ParseFromString(data)
            model.description.metadata.Clear()
            data = model.SerializeToString(deterministic=True)
        told.update(file.name.encode() + hashlib.sha256(data).digest())
    return told


def program_key(component: Component, checkpoint: Checkpoint, options: export.ExportOptions) -> str:
    """Of everything that a network is built from: configurations, names and shapes of all weights, and the values
    of those that have no placeholders."""
    told = _told(component, checkpoint, options.shape)
    told.update(repr((options.attention, _chosen(options))).encode())
    for name, tensor in checkpoint.models[component.subfolder].tensors().items():
        told.update(name.encode())
        _tell(told, tensor)
    return str(told.hexdigest())


def narrowed(component: Component, checkpoint: Checkpoint, shape: Shape) -> tuple[Checkpoint, Shape]:
    """What ``component`` is built of: whatever else the checkpoint is, its program is the same."""
    folded = checkpoint.folded
    settings = replace(
        checkpoint,
        pipeline_config={},
        schedulers={} if folded.prediction_type is None else checkpoint.schedulers,
    )
    if component.name == "safety_checker":
        own = {component.name: checkpoint.models[component.name]}
        alone = Checkpoint(checkpoint.name, "sd1", checkpoint.source, own, {}, {})
        return alone, Shape(shape.height, shape.width, 1)
    if component.name in ("unet", "control_unet"):
        shape = replace(shape, context_length=shape.context_length or text_length(checkpoint))
    if component.name not in (*TEXT_ENCODERS, *VAES):
        return settings, shape
    text = component.name in TEXT_ENCODERS
    others = TEXT_ENCODERS if text else ("vae",)
    narrow = replace(
        settings,
        family=next(name for name in FAMILIES if _traits(name, text) == _traits(checkpoint.family, text)),
        models={
            name: model if name == component.subfolder or not text else Submodel("", {}, dict, ())
            for name, model in checkpoint.models.items()
            if name in (component.subfolder, *others)
        },
        schedulers={},
        tokenizers=checkpoint.tokenizers if text else {},  # they say how long texts are
        folded=Folded(padding=folded.padding) if text else Folded(latents=folded.latents),
        refiner=None,
        clip_skip=checkpoint.clip_skip if text else 0,
        controlnets={},
        ip_adapters=(),
        t2i_adapters={},
    )
    return narrow, ANY if text else Shape(shape.height, shape.width, 1)


def built_of(component: Component, checkpoint: Checkpoint, shape: Shape) -> tuple[Checkpoint, Shape]:
    """What a program is built of, where that is less than what its inputs are drawn with. The program is made of
    this: what is not here, it is not built of."""
    checkpoint, shape = narrowed(component, checkpoint, shape)
    if component.name != "unet" or checkpoint.ip_adapters or checkpoint.t2i_adapters:
        return checkpoint, shape
    levels = len(checkpoint.models["vae"].config.get("block_out_channels", (64,)))
    others = {"vae": {"block_out_channels": [0] * levels}} | {
        name: {"projection_dim": checkpoint.models[name].config.get("projection_dim")}
        for name in TEXT_ENCODERS
        if name in checkpoint.models
    }
    built = replace(
        checkpoint,
        models={"unet": checkpoint.models["unet"]}
        | {name: Submodel("", config, dict, ()) for name, config in others.items()},
        tokenizers={},
        folded=Folded(prediction_type=checkpoint.folded.prediction_type),
        padding=None,
        refiner=None,
        added_tokens=(),
        clip_skip=0,
        controlnets={},
    )
    return built, shape


def _traits(name: str, text: bool) -> tuple[Any, ...]:
    """What a family's text encoders follow from, or its VAE."""
    family = FAMILIES[name]
    of_vae = family.added_conditions, family.latent_scale, family.latent_shift
    return (family.joint_text, family.pad_token) if text else of_vae


def trace_key(graph: Graph, traced: torch.jit.ScriptModule, options: export.ExportOptions) -> str:
    """Of everything that ``ct.convert`` is given: operations with their modules, constants, placeholders and other
    parameters, interface, precision and target. Not the attention kind: it is in the operations."""
    operations: Any = traced.inlined_graph
    # torch numbers classes that are traced more than once in a process.
    told = hashlib.sha256(re.sub(r"___torch_mangle_\d+\.", "", str(operations)).encode())
    for node in operations.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            _tell(told, node.t("value"))
    for name, value in sorted(traced.state_dict().items()):
        told.update(name.encode())
        _tell(told, value)
    told.update(repr((graph.inputs, graph.outputs, graph.exact, *_chosen(options))).encode())
    return told.hexdigest()


def _told(component: Component, checkpoint: Checkpoint, shape: Shape) -> Any:
    """A hash of what a component is built from, but for weights."""
    return hashlib.sha256(repr((component.name, shape, _configured(checkpoint))).encode())


def _configured(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that a checkpoint is, but for its weights, its name and where it was."""
    found = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    found |= {
        "models": {name: (model.class_name, model.config) for name, model in checkpoint.models.items()},
        "tokenizers": {
            subfolder: {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
            for subfolder, files in checkpoint.tokenizers.items()
        },
        "refiner": checkpoint.refiner and _configured(checkpoint.refiner),
    }
    return {name: value for name, value in found.items() if name not in ("name", "source", "notes")}


def _is_ours(component: Component) -> bool:
    """Whether a component is the product's. A test's own may be built of more than it is given."""
    if kind_of(component.name) not in COMPONENTS:
        return False
    known = components.component(component.name)
    return component == known or component.build_of is known.build_of is not None


def _chosen(options: export.ExportOptions) -> tuple[Any, ...]:
    return options.target, options.precision, sorted(options.float32_ops), sorted(options.float32_modules)


def _tell(told: Any, value: torch.Tensor) -> None:
    if value.dtype is torch.bfloat16:  # which numpy has not
        value = value.view(torch.int16)
    array = value.detach().numpy()
    told.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(thin(array)).tobytes())
