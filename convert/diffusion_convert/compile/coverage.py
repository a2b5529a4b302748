"""What the compiler covers. Everything else is refused by name before anything is written, all of it at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusion_convert.compile.op_versions import histogram_key
from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.families import SYSTEMS, compiles
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.program import Feature, Function, operations
from diffusion_runtime.mil.text_print import OPSETS

UNCOUNTED = frozenset({"const"})
"""Operations that the histogram leaves out."""


def check(model: Model, source: Path) -> None:
    """Raise UnsupportedError that lists everything in ``model`` whose compiled form is not known."""
    found = list(_unsupported(model))
    if found:
        raise UnsupportedError(
            f"{source}: cannot be compiled here: {'; '.join(found)} (macOS: use --compiler xcrun)"
        )


def opset_number(opset: str) -> int:
    """CoreML7 -> 17."""
    return int(OPSETS[opset].removeprefix("ios"))


def inferred_versions(function: Function) -> tuple[str, ...]:
    """The operations whose key in the histogram was never seen in a real compiled model, or that have none."""
    opset = opset_number(function.opset)
    types = {operation.type for operation in operations(function.block)} - UNCOUNTED
    keys = {kind: histogram_key(kind, opset) for kind in types}
    return tuple(sorted(kind for kind, key in keys.items() if key is None or not key.observed))


def _unsupported(model: Model) -> Iterator[str]:
    if not compiles(model.specification_version):
        known = ", ".join(map(str, filter(compiles, SYSTEMS)))
        yield f"specification version {model.specification_version} (known: {known})"
        return
    if model.is_updatable:
        yield "an updatable model"
    if model.default_function or list(model.program.functions) != ["main"]:
        yield (
            f"functions {', '.join(model.program.functions)} (known: a single main): the compiled form of "
            "several was never seen; for compiled models of several sizes convert with --target macOS14 or iOS17"
        )
        return
    if model.program.doc_string:
        yield "a program with a doc string"
    unknown = set(model.program.attributes) - {"buildInfo"}
    if unknown:
        yield f"program attributes {', '.join(sorted(unknown))}"
    for feature in (*model.interface.inputs, *model.interface.outputs):
        yield from _unsupported_feature(feature)
    if model.interface.states:
        yield f"state {', '.join(state.name for state in model.interface.states)}"
    yield from _unsupported_function(model.program.functions["main"])


def _unsupported_feature(feature: Feature) -> Iterator[str]:
    if feature.kind != "multiArray":
        yield f"{feature.name} is of kind {feature.kind or 'unknown'} (known: multiArray)"
    elif any(upper < 0 for _, upper in feature.shape_range):
        yield f"{feature.name} has an unbounded shape"


def _unsupported_function(function: Function) -> Iterator[str]:
    if function.opset not in OPSETS or opset_number(function.opset) > 18:
        yield f"opset {function.opset} (known: CoreML5 to CoreML8)"
        return
    if function.attributes:
        yield f"function attributes {', '.join(sorted(function.attributes))}"
    opset = opset_number(function.opset)
    everything = list(operations(function.block))
    nested = sorted({operation.type for operation in everything if operation.blocks})
    if nested:
        yield f"nested blocks of {', '.join(nested)}"
    types = {operation.type for operation in everything if not operation.blocks} - UNCOUNTED
    unknown = sorted(kind for kind in types if histogram_key(kind, opset) is None)
    if unknown:
        yield f"unknown operations {', '.join(unknown)}"
    escaped = sorted({text for text in _strings(function) if not _plain(text)})
    if escaped:
        yield f"strings that need escapes: {', '.join(map(repr, escaped[:3]))}"


def _strings(function: Function) -> Iterator[str]:
    for _, value in (pair for operation in operations(function.block) for pair in operation.values):
        if isinstance(value.data, str):
            yield value.data
        elif isinstance(value.data, np.ndarray) and value.data.dtype.kind == "O":
            yield from value.data.ravel().tolist()


def _plain(text: str) -> bool:
    return text.isprintable() and '"' not in text and "\\" not in text
