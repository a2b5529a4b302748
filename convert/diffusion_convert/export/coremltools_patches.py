"""Patches that skip coremltools 9.0's passes that are wasted on placeholder weights (`placeholders`).

Of the minute that a full-size UNet takes in ``ct.convert``, most went into looking at, copying and comparing
constants whose values mean nothing, and into validating all blocks after each of a hundred passes. `lean` replaces
those functions for the length of one call, puts them back whatever happens, and sends each weight to a writer of
ours as the program is serialised. What it replaces is private to coremltools, hence the exact version in
pyproject.toml, and a test that each replacement is called.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from diffusion_convert.export.float16 import in_place
from diffusion_convert.export.placeholders import FLOAT16_MAX, Placeholders, thin
from diffusion_runtime.coremltools_import import import_coremltools

Write = Callable[[np.ndarray], int]
"""Stores a constant in the weight file and returns its offset."""
OnFraction = Callable[[float], None]

ASK_FOR_TYPES = (
    "input_type",
    "types.type_dict",
    "types.type_list",
    "types.type_mapping",
    "types.type_state",
    "types.type_tensor",
    "types.type_tuple",
)
"""The modules of coremltools' MIL that call ``get_type_info`` by a name of their own."""


Replacement = tuple[Any, str, Any]
"""Of which module or class, the name, and what takes its place."""


@contextmanager
def patched_coremltools(
    placeholders: Placeholders, write: Write, progress: OnFraction = lambda _: None
) -> Iterator[None]:
    """In this context, one ``ct.convert`` is fast, and its large constants go to ``write`` one by one: a
    placeholder as itself, for the caller to look up."""
    logger = logging.getLogger("coremltools")
    with ExitStack() as replaced:
        for owner, name, value in (*_in_passes(placeholders, progress), *_in_types(), *_at_the_ends(write)):
            replaced.enter_context(mock.patch.object(owner, name, value))
        replaced.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        yield


def _mil(name: str) -> Any:
    return import_coremltools(f"converters.mil.mil.{name}")


def _in_passes(placeholders: Placeholders, progress: OnFraction) -> Iterator[Replacement]:
    passes, cast = _mil("passes.pass_pipeline"), _mil("passes.defs.quantization").FP16ComputePrecision
    # It would validate every block after each pass. The passes are not ours, and what they make is validated twice
    # before it is serialised.
    run = _passes(passes.PASS_REGISTRY, _counter(progress))
    yield passes.PassPipelineManager, "apply_pipeline", staticmethod(run)
    # It would look at every element of a placeholder, once for every operation that uses it.
    yield cast, "fp16_overflow", staticmethod(_overflow(placeholders))
    yield cast, "_check_underflow_to_zero", _underflow(cast._check_underflow_to_zero)
    # It would make each operation anew, between casts.
    yield cast, "apply", in_place(cast.apply)
    # It would compare constants by value: placeholders have a code each, so no two are equal.
    duplicates = _mil("passes.defs.cleanup.const_deduplication").const_deduplication
    yield duplicates, "should_be_deduplicated", staticmethod(_small(duplicates.should_be_deduplicated))
    # It would infer all types and values anew where it has found nothing to do.
    yield _mil("passes.defs.optimize_repeat_ops")._TransposeOptimization, "apply_transform", _cancelled()
    # It would collect garbage while all of the program is still needed; we do after it.
    yield import_coremltools("converters._converters_entry"), "gc", SimpleNamespace(collect=lambda: 0)


def _in_types() -> Iterator[Replacement]:
    block, variable, cast = _mil("block"), _mil("var").Var, _mil("ops.defs.iOS15.elementwise_unary").cast
    yield block.Block, "_propagate_nonreplaceable_vars", lambda _: None  # of compressed weights: none here
    # It would print the whole program for a log that nobody reads.
    yield block.Function, "__str__", lambda function: function.name
    # It would copy lists of names by `copy.deepcopy`.
    yield variable, "scopes", property(variable.scopes.fget, _set_scopes)
    # It would write out what a placeholder only repeats, which takes the memory of the whole weight.
    yield cast, "get_cast_value", classmethod(_cast(cast.get_cast_value.__func__))
    # It would ask for a constant's type, then for its value, and look both up each time.
    constant = _mil("ops.defs.iOS15.control_flow").Const
    yield constant, "_get_type_val", _once(constant._get_type_val)
    # They describe a type anew each time that they ask whether it is a tensor, half a million times.
    for types in map(_mil, ASK_FOR_TYPES):
        yield types, "get_type_info", _remembered(types.get_type_info)


def _at_the_ends(write: Write) -> Iterator[Replacement]:
    # The one place where the serialiser writes a constant to the weight file: here the real weight comes in.
    helper = import_coremltools("converters.mil.backend.mil.load").helper
    yield helper, "_get_offset_by_writing_data", lambda var, _: write(var.val)
    node = import_coremltools("converters.mil.frontend.torch.internal_graph").InternalTorchIRNode
    yield node, "from_torchscript_node", classmethod(_placed(node.from_torchscript_node.__func__))
    # It would compare each weight of the trace with itself, element by element.
    yield torch, "equal", _equal(torch.equal)
    # Its progress bars would be drawn through ours.
    yield import_coremltools("converters.mil.frontend.torch.ops"), "_tqdm", lambda nodes, **_: nodes


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """In this context, coremltools makes its temporary files in ``folder``. Where a process is killed they stay; in
    the system's folder for temporary files nobody would know whose they are."""
    here = SimpleNamespace(
        mkdtemp=partial(tempfile.mkdtemp, dir=folder),
        TemporaryDirectory=partial(tempfile.TemporaryDirectory, dir=folder),
        NamedTemporaryFile=partial(tempfile.NamedTemporaryFile, dir=folder),
    )
    with ExitStack() as replaced:
        for name in ("models.utils", "models.model", "converters.mil.converter"):
            replaced.enter_context(mock.patch.object(import_coremltools(name), "_tempfile", here))
        yield


def _counter(progress: OnFraction) -> Callable[[], None]:
    """Each call reports another of the passes that ``ct.convert`` makes in all."""
    # About as many as coremltools 9.0 makes; where it is not exact, only the bar moves unevenly.
    total, done = 100, 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(min(done / total, 1.0))

    return step


def _passes(registry: Any, done: Callable[[], None]) -> Callable[[Any, Any], None]:
    """All passes of a pipeline."""

    def apply_pipeline(program: Any, pipeline: Any) -> None:
        pipeline.validate()
        for name in pipeline.passes:
            graph_pass = registry[name]
            graph_pass.set_options(pipeline.get_options(name))
            graph_pass(program)
            done()

    return apply_pipeline


def _overflow(placeholders: Placeholders) -> Callable[[Any], bool]:
    """Whether an operation has a finite constant operand beyond float16; of a placeholder, its weight counts."""

    def fp16_overflow(operation: Any) -> bool:
        for operands in operation.inputs.values():
            for var in operands if isinstance(operands, (list, tuple)) else [operands]:
                constant = var.op is not None and var.op.op_type == "const"
                if constant and var.is_tensor_or_scalar_of(dtype="fp32") and exceeds(var.op.val.val):
                    return True
        return False

    def exceeds(value: Any) -> bool:
        array = np.asarray(value)
        found = placeholders.find(array)
        if found is not None:
            return placeholders.exceeds_float16(found)
        size = np.abs(thin(array))
        # As the original: what is beyond 1e38 stands for infinity, in masks, and may become float16's.
        return bool(((size > FLOAT16_MAX) & (size < 1e38)).any())

    return fp16_overflow


def _underflow(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """What the original looks at one by one are values that became zero, or the next to it."""

    def check_underflow_to_zero(self: Any, new_var: Any, var: Any) -> None:
        few = new_var.val is not None and np.size(var.val) < 400  # as the original does, which copies the constant
        if few and not np.all(np.abs(new_var.val) > np.finfo(np.float16).smallest_subnormal):
            original(self, new_var, var)

    return check_underflow_to_zero


def _equal(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def equal(one: Any, other: Any) -> bool:
        same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.shape == other.shape
        return (same and one.dtype == other.dtype) or original(one, other)

    return equal


def _remembered(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``original``, called once for each class: a type of coremltools is a class, and does not change."""
    known: dict[type, Any] = {}

    def get_type_info(kind: Any) -> Any:
        if not isinstance(kind, type):
            return original(kind)
        if kind not in known:
            known[kind] = original(kind)
        return known[kind]

    return get_type_info


def _once(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``original``, called once where it is asked for the same value again at once."""
    asked: list[Any] = [None, None]

    def get_type_val(self: Any, value: Any) -> Any:
        if isinstance(value, (list, tuple)):  # which are copied
            return original(self, value)
        if asked[0] is not value:
            asked[:] = value, original(self, value)
        return asked[1]

    return get_type_val


def _cancelled() -> Callable[[Any], None]:
    """Transposes that cancel each other taken away, with what the search has put in. Only then are types inferred
    anew, and not those of constants."""

    def apply_transform(self: Any) -> None:
        self._verify_cancellable_transposes()
        with mock.patch.object(self.block, "replace_uses_of_var_after_op", _where_used(self.block)):
            for transpose in self.transpose_op_to_cancel_ops:
                self._remove_transpose_ops(transpose)
        self.block.set_outputs([sink.x for sink in self.output_sink_ops])
        self.block.remove_ops(list(self.output_sink_ops))
        if self.transpose_op_to_cancel_ops:
            for operation in self.block.operations:
                if operation.op_type != "const":
                    operation.type_value_inference(overwrite_output=True)

    return apply_transform


def _where_used(block: Any) -> Callable[..., None]:
    """It would look for uses of a transpose's output in all operations after its input."""
    original = block.replace_uses_of_var_after_op

    def replace_uses(anchor_op: Any, old_var: Any, **named: Any) -> None:
        alone = named.get("end_op") is None and len(set(old_var.child_ops)) == 1  # else their order counts
        original(anchor_op=old_var.op if alone else anchor_op, old_var=old_var, **named)

    return replace_uses


def _set_scopes(variable: Any, scopes: Any) -> None:
    copied = copy.copy(scopes)
    copied.update({source: list(names) for source, names in scopes.items()})
    variable.op.scopes = copied


def _small(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def should_be_deduplicated(value: Any) -> bool:
        return bool(original(value)) and not _repeats(value)

    return should_be_deduplicated


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    """Casting a placeholder casts what it stores and repeats that."""

    def get_cast_value(cls: Any, var: Any, dtype: str) -> Any:
        if not _repeats(var.val):
            return original(cls, var, dtype)
        types = import_coremltools("converters.mil.mil.types.type_mapping")
        return np.broadcast_to(thin(var.val).astype(types.string_to_nptype(dtype)), var.val.shape)

    return get_cast_value


def _placed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Nodes with the whole path of their torch module: coremltools leaves out the names of lists of modules."""

    def from_torchscript_node(cls: Any, node: Any, parent: Any) -> Any:
        made = original(cls, node, parent)
        path = node.scopeName().rpartition("/")[2].removeprefix("__module").removeprefix(".")
        made.model_hierarchy = ".".join(f"{name}(Module)" for name in path.split(".")) if path else ""
        return made

    return from_torchscript_node


def _repeats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and 0 in value.strides
