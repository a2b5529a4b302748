"""The one path that every component takes to a package: build, trace, convert, write."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.tensor_file import let_go
from diffusion_convert.compile.metadata_json import compute_precision
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.export.coremltools_patches import patched_coremltools, temporary_files_in
from diffusion_convert.export.derivations import Derivations
from diffusion_convert.export.placeholders import Misplaced, Placeholders, is_finite
from diffusion_convert.export.split_attention import COPY, in_one_piece, split
from diffusion_convert.export.trace import trace
from diffusion_convert.networks import teach_coremltools
from diffusion_convert.options import Precision
from diffusion_runtime.atomic import work
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import CheckpointError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil import description, proto
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import write_package
from diffusion_runtime.mil.program import DType, FunctionInterface, Metadata
from diffusion_runtime.mil.weights import WeightWriter

OnPhase = Callable[[str, float], None]
"""Told what is being done ("load", "trace", "convert", "save") and how much of it is done, from 0 to 1."""

TRIES_WITH_PLACEHOLDERS = 3
"""What networks do to their weights is found when they are built, then in the converter: each may take a try."""

DTYPES = {np.dtype(dtype.value.replace("fp", "float")): dtype for dtype in (DType.FLOAT16, DType.FLOAT32)} | {
    np.dtype(dtype.value): dtype
    for dtype in (DType.INT8, DType.UINT8, DType.INT16, DType.UINT16, DType.INT32, DType.UINT32)
}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a component is converted. ``float32_ops`` and ``float32_modules`` are MIL operations (`mil_name`) and
    torch modules that stay in float32."""

    attention: AttentionKind
    shape: Shape
    target: str
    precision: Precision = Precision.AUTO
    float32_ops: frozenset[str] = frozenset()
    float32_modules: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export tells about its package: ``modules`` maps MIL operations to the torch modules that they are
    from; ``precision`` is float16 where it computes in it anywhere, ``float32_weights`` are weights that float16
    cannot hold. The network is not kept: it holds its file mapped."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    modules: Mapping[str, str]
    precision: str
    float32_weights: tuple[str, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Program:
    """A component's interface, its program, and the torch modules that its operations are from."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    description: str
    model: Model
    modules: Mapping[str, str]


def export(
    component: Component,
    checkpoint: Checkpoint,
    options: ExportOptions,
    path: Path,
    metadata: Metadata,
    progress: OnPhase = lambda *_: None,
) -> Exported:
    """Write ``component`` to the package ``path``; an export that fails writes nothing there.

    Weights are read one by one, as they are written. Where a network does something with a weight that a
    placeholder does not survive, that weight is in memory from the start; where this does not do, all are.
    """

    def attempt(placeholders: Placeholders) -> Exported:
        return _export(component, checkpoint, options, path, metadata, progress, placeholders)

    by_value: frozenset[str] = frozenset()
    for _ in range(TRIES_WITH_PLACEHOLDERS):
        try:
            return attempt(Placeholders(by_value=by_value))
        except Misplaced as misplaced:
            by_value |= misplaced.names
    return attempt(Placeholders(enabled=False))


def _export(
    component: Component,
    checkpoint: Checkpoint,
    options: ExportOptions,
    path: Path,
    metadata: Metadata,
    progress: OnPhase,
    placeholders: Placeholders,
) -> Exported:
    clock = _Clock(progress)
    clock.start("load")
    stand_ins = placeholders.view(checkpoint.models[component.subfolder].tensors())
    with work(path.parent) as slot:
        weights = slot / "weight.bin"
        with WeightWriter(weights) as writer, temporary_files_in(slot):
            on_stand_ins = _on(stand_ins, checkpoint, component)
            program = _program(component, on_stand_ins, options, placeholders, writer, clock)
        clock.start("save")
        write_package(_described(program, metadata), path, weights)
    # In a VAE that says `force_upcast` nothing is float16.
    precision = "float16" if "Float16" in compute_precision(program.model.function) else "float32"
    exceeding = placeholders.exceeding()
    return Exported(program.inputs, program.outputs, program.modules, precision, exceeding, clock.finish())


def _program(
    component: Component,
    checkpoint: Checkpoint,
    options: ExportOptions,
    placeholders: Placeholders,
    writer: WeightWriter,
    clock: _Clock,
) -> _Program:
    """The network of a checkpoint with placeholders for its weights, which are written."""
    with Derivations(checkpoint.models[component.subfolder].tensors()) as derivations:
        graph = component.build(checkpoint, options.attention, options.shape)
    # What is computed of a placeholder while the network is built looks like a weight and is nonsense.
    placeholders.check_unused(derivations.used)
    placeholders.keep(graph.module.state_dict().values())
    clock.start("trace")
    with torch_networks.silent(), in_one_piece(graph.module) as pieces:
        traced = trace(graph)
    clock.start("convert")
    model, modules = _convert(graph, traced, options, placeholders, writer, clock)
    placeholders.check_all_taken()
    return _Program(graph.inputs, graph.outputs, graph.description, *split(model, pieces, modules))


def _on(tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint, component: Component) -> Checkpoint:
    """``checkpoint`` with ``tensors`` for the component's own."""
    submodel = checkpoint.models[component.subfolder]
    stand_in = Submodel(submodel.class_name, submodel.config, lambda: tensors, submodel.files)
    return replace(checkpoint, models={**checkpoint.models, component.subfolder: stand_in})


def _convert(
    graph: Graph,
    traced: torch.jit.ScriptModule,
    options: ExportOptions,
    placeholders: Placeholders,
    writer: WeightWriter,
    clock: _Clock,
) -> tuple[Model, dict[str, str]]:
    ct = import_coremltools()
    teach_coremltools()

    write = partial(write_constant, placeholders, writer)
    with torch_networks.silent(), patched_coremltools(placeholders, write, clock.progress):
        converted = ct.convert(
            traced,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, options.target),
            compute_precision=_precision(ct, graph, options),
            inputs=[ct.TensorType(port.name, _shape(ct, port), np.dtype(port.dtype)) for port in graph.inputs],
            outputs=[ct.TensorType(port.name, dtype=np.dtype(port.dtype)) for port in graph.outputs],
            # Loading compiles the model, on macOS only: the package is not finished yet.
            skip_model_load=True,
        )
    model = proto.model_from_bytes(converted.get_spec().SerializeToString())
    return model, _modules(converted._mil_program)


def write_constant(placeholders: Placeholders, writer: WeightWriter, array: np.ndarray) -> int:
    """Store ``array``, or the weight that it stands for, and let go of that; its offset in the weight file."""
    found = placeholders.take(array)
    offset = writer.add(_stored(array, found), DTYPES[array.dtype])
    if found is not None:
        let_go(found[1])
    return offset


def _shape(ct: Any, port: Port) -> Any:
    return ct.EnumeratedShapes(port.shapes, default=port.shape) if port.shapes else port.shape


def _stored(array: np.ndarray, weight: tuple[str, torch.Tensor] | None) -> np.ndarray:
    """The elements to store for a constant: its own, or those of the named weight that it stands for, in the
    constant's type."""
    if weight is None:
        return np.ascontiguousarray(array)
    name, tensor = weight
    stored = tensor.to(torch.float16 if array.dtype == np.float16 else torch.float32).contiguous()
    if not is_finite(stored):
        kind = "no room in float16" if is_finite(tensor) else "an infinite or undefined value"
        raise CheckpointError(f"the weight {name} has {kind}: the checkpoint is damaged")
    return stored.numpy()


def _precision(ct: Any, graph: Graph, options: ExportOptions) -> Any:
    if options.precision is Precision.FLOAT32:
        return ct.precision.FLOAT32

    wide, module_of = (*graph.exact, *options.float32_modules), _module_reader()

    def in_float16(operation: Any) -> bool:
        module = module_of(operation)
        exact = any(module == name or module.startswith(f"{name}.") for name in wide)
        return mil_name(operation.name) not in options.float32_ops and not exact

    return ct.transform.FP16ComputePrecision(op_selector=in_float16)


def mil_name(name: str) -> str:
    """An operation's name as coremltools spells it in the end, without the suffix of its conversion to float16. All
    heads and chunks of an attention have one name: coremltools knows one operation for them."""
    plain = COPY.sub("", re.sub(r"[^a-zA-Z0-9_]", "_", name)).removesuffix("_cast_fp16")
    return f"var_{plain}" if plain[:1].isdigit() else plain


def _modules(program: Any) -> dict[str, str]:
    """MIL operation -> path of the torch module that it is from."""
    module_of = _module_reader()
    return {
        output.name: module_of(operation)
        for function in program.functions.values()
        for operation in function.operations
        if operation.op_type != "const"
        for output in operation.outputs
    }


def _module_reader() -> Callable[[Any], str]:
    """Tells the innermost torch module that an operation is from, as ``named_modules`` spells it; "" for the
    whole."""
    scope = import_coremltools("converters.mil.mil.scope").ScopeSource.TORCHSCRIPT_MODULE_NAME

    def read(operation: Any) -> str:
        # The last scope is that of the operation itself.
        *modules, _ = operation.scopes.get(scope) or [""]
        return ".".join(modules)

    return read


def _described(program: _Program, metadata: Metadata) -> Model:
    """The model with descriptions of its inputs and outputs, and ``metadata``."""
    model = program.model
    texts = {port.name: port.description for port in (*program.inputs, *program.outputs)}

    def described(interface: FunctionInterface) -> FunctionInterface:
        return replace(
            interface,
            inputs=tuple(replace(feature, description=texts[feature.name]) for feature in interface.inputs),
            outputs=tuple(replace(feature, description=texts[feature.name]) for feature in interface.outputs),
        )

    interfaces = [described(interface) for interface in model.interfaces]
    about = replace(metadata, description=program.description)
    return replace(model, description=description.serialize(interfaces, about, model.default_function))


class _Clock:
    """Tells the time of each phase, and its progress."""

    def __init__(self, progress: OnPhase) -> None:
        self._report = progress
        self._phase = ""
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    def start(self, phase: str) -> None:
        self.finish()
        self._phase, self._since = phase, time.perf_counter()
        self._report(phase, 0.0)

    def progress(self, done: float) -> None:
        self._report(self._phase, done)

    def finish(self) -> dict[str, float]:
        if self._phase:
            self._seconds[self._phase] = time.perf_counter() - self._since
            self._report(self._phase, 1.0)
        self._phase = ""
        return self._seconds
