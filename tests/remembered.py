"""What ``ct.convert`` makes of a network, and what comes of running a package, kept for the length of a run.

They take most of the time of a conversion, and most conversions of the tests are of a network that another test has
converted. Weights are no part of the first, but for what the network is traced with: coremltools sees placeholders.
They are written anew each time, from the checkpoint at hand. Of the second they are: the same program with the same
weights computes the same of the same inputs. Nothing else of an export is kept.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from diffusion_convert.components.component import Graph
from diffusion_convert.export import export, placeholders
from diffusion_convert.export.placeholders import Placeholders, thin
from diffusion_convert.verification import compare
from diffusion_runtime.coremltools_import import import_messages
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.weights import WeightWriter

Convert = Callable[..., tuple[Model, dict[str, str]]]
Measure = Callable[..., compare.Verdict]


@dataclass(frozen=True)
class Kept:
    """``constants``: what was written to the weight file, in order, without repetitions, and its shape.
    ``exceeding``: the placeholders whose weights were asked whether they exceed float16, and the answers, which
    decide what stays in float32."""

    model: Model
    modules: dict[str, str]
    constants: list[tuple[np.ndarray, tuple[int, ...]]]
    exceeding: dict[int, bool]


@contextmanager
def conversions(folder: Path) -> Iterator[None]:
    """In this context, exports look in ``folder`` before they call coremltools, and verification before it runs.
    Weights as small as the tests' have placeholders, as if they had the sizes of real ones."""
    folder.mkdir(exist_ok=True)
    with (
        mock.patch.object(placeholders, "MIN_SIZE", 64),
        mock.patch.object(export, "_convert", _remembering(export._convert, folder)),
        mock.patch.object(compare, "_measure", _measuring(compare._measure, folder)),
    ):
        yield


def _keep(value: object, path: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.replace(path)


def _remembering(convert: Convert, folder: Path) -> Convert:
    @wraps(convert)
    def remembering(
        graph: Graph,
        traced: torch.jit.ScriptModule,
        options: export.ExportOptions,
        placeholders: Placeholders,
        writer: WeightWriter,
        clock: Any,
    ) -> tuple[Model, dict[str, str]]:
        path = folder / key(graph, traced, options)
        kept: Kept | None = pickle.loads(path.read_bytes()) if path.is_file() else None  # noqa: S301 (our own)
        if kept and all(placeholders.exceeds_float16(index) == is_so for index, is_so in kept.exceeding.items()):
            for array, shape in kept.constants:
                export.write_constant(placeholders, writer, np.broadcast_to(array, shape))
            return kept.model, kept.modules
        constants: list[tuple[np.ndarray, tuple[int, ...]]] = []

        def write(placeholders: Placeholders, writer: WeightWriter, array: np.ndarray) -> int:
            constants.append((np.array(thin(array)), array.shape))
            return written(placeholders, writer, array)

        written = export.write_constant
        with mock.patch.object(export, "write_constant", write):
            model, modules = convert(graph, traced, options, placeholders, writer, clock)
        _keep(Kept(model, modules, constants, dict(placeholders._exceeding)), path)
        return model, modules

    return remembering


def _measuring(measure: Measure, folder: Path) -> Measure:
    @wraps(measure)
    def measuring(
        package: Path, expected: compare.Expected, progress: compare.OnFraction, passes: Sequence[Any]
    ) -> compare.Verdict:
        path = folder / verdict_key(package, expected, passes)
        if path.is_file():
            progress(0.0)
            progress(1.0)
            kept: compare.Verdict = pickle.loads(path.read_bytes())  # noqa: S301 (our own)
            return kept
        verdict = measure(package, expected, progress, passes)
        _keep(verdict, path)
        return verdict

    return measuring


def verdict_key(package: Path, expected: compare.Expected, passes: Sequence[Any]) -> str:
    """Of everything that the package computes from, and what it is compared with. Not of the description, which has
    the checkpoint's name."""
    model = import_messages("Model_pb2").Model()
    told = hashlib.sha256(repr([one.__qualname__ for one in passes]).encode())
    for file in sorted(path for path in (package / "Data").rglob("*") if path.is_file()):
        data = file.read_bytes()
        if file.suffix == ".mlmodel":
            model.ParseFromString(data)
            model.description.metadata.Clear()
            data = model.SerializeToString(deterministic=True)
        told.update(file.name.encode() + hashlib.sha256(data).digest())
    for run in (*expected.inputs, *expected.outputs):
        for name, array in sorted(run.items()):
            told.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return told.hexdigest()


def key(graph: Graph, traced: torch.jit.ScriptModule, options: export.ExportOptions) -> str:
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
    chosen = (options.target, options.precision, sorted(options.float32_ops), sorted(options.float32_modules))
    told.update(repr((graph.inputs, graph.outputs, graph.exact, *chosen)).encode())
    return told.hexdigest()


def _tell(told: Any, value: torch.Tensor) -> None:
    array = value.detach().numpy()
    told.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(thin(array)).tobytes())
