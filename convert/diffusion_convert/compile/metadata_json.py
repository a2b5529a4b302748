"""metadata.json, which apps read: interface, operations, precisions, availability. Schema values are strings."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from diffusion_convert.compile.coverage import UNCOUNTED, opset_number
from diffusion_convert.compile.op_versions import histogram_key
from diffusion_runtime.families import SYSTEMS
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.program import (
    Blob,
    DType,
    Feature,
    Function,
    Operation,
    TensorType,
    Value,
    operations,
)

_COMPUTED = {
    DType.FLOAT16: "Float16",
    DType.FLOAT32: "Float32",
    DType.FLOAT64: "Float64",
    DType.INT16: "Int16",
    DType.INT32: "Int32",
    DType.INT64: "Int64",
    DType.UINT16: "UInt16",
    DType.UINT32: "UInt32",
}
_PALETTES = frozenset({"constexpr_lut_to_dense", "constexpr_lut_to_sparse"})


def metadata_json(model: Model, name: str) -> str:
    """The whole file; ``name`` is the compiled model's, without its suffix. No line break at its end."""
    # Indent, separators, characters and the order of keys are those of Apple's compiler, byte for byte.
    return json.dumps([_metadata(model, name)], indent=2, separators=(",", " : "), ensure_ascii=False)


def histogram(function: Function) -> dict[str, int]:
    """Operations by their versioned key, as apps look them up; constants are not counted. Sorted by key."""
    opset = opset_number(function.opset)
    counts: Counter[str] = Counter()
    for operation in operations(function.block):
        key = None if operation.type in UNCOUNTED else histogram_key(operation.type, opset)
        if key is not None:
            counts[key.text] += 1
    return dict(sorted(counts.items()))


def compute_precision(function: Function) -> str:
    """Element types over all results, constants included: "Float16" or "Mixed (Float16, Int32)"."""
    kinds = {
        variable.type.dtype
        for operation in operations(function.block)
        for variable in operation.outputs
        if isinstance(variable.type, TensorType)
    }
    return _joined({_COMPUTED[kind] for kind in kinds if kind in _COMPUTED})


def storage_precision(function: Function) -> str | None:
    """How weights are stored: "Mixed (Float16, Palettized (6 bits))"; None where none are in a file."""
    found: set[str] = set()
    for operation in operations(function.block):
        found.update(_stored(operation))
    return _joined(found) if found else None


def palette_bits(operation: Operation) -> int | None:
    """Bits per weight of a palettized constant; None of any other operation.

    The table is of shape (2^n,) in its iOS 16 form, (…, 2^n, vector) in its iOS 18 form.
    """
    if operation.type not in _PALETTES:
        return None
    table = next(value for name, value in operation.values if name == "lut")
    shape = table.type.shape if isinstance(table.type, TensorType) else ()
    # The last axis of the iOS 18 form holds vectors; palettes of ours have vectors of one element.
    entries = shape[0] if len(shape) == 1 else shape[-2]
    return (entries or 1).bit_length() - 1


def _metadata(model: Model, name: str) -> dict[str, Any]:
    function, interface, about = model.program.functions["main"], model.interface, model.metadata
    storage = storage_precision(function)
    optional = {
        "shortDescription": about.description,
        "version": about.version,
        "author": about.author,
        "license": about.license,
        "storagePrecision": storage or "",
    }
    return {
        "metadataOutputVersion": "3.0",
        **{key: value for key, value in optional.items() if value},
        "modelParameters": [],
        "specificationVersion": model.specification_version,
        "mlProgramOperationTypeHistogram": histogram(function),
        "computePrecision": compute_precision(function),
        "isUpdatable": "0",
        "stateSchema": [],
        "availability": dict(SYSTEMS[model.specification_version].availability or {}),
        "modelType": {"name": "MLModelType_mlProgram"},
        "inputSchema": [_schema(feature) for feature in interface.inputs],
        "outputSchema": [_schema(feature) for feature in interface.outputs],
        "userDefinedMetadata": dict(sorted(about.user_defined.items())),
        "generatedClassName": re.sub(r"\W", "_", name),
        "method": "predict",
    }


def _schema(feature: Feature) -> dict[str, str]:
    sizes = " × ".join(map(str, feature.shape))
    flexible = {}
    if feature.shape_range:
        flexible = {
            "shapeFlexibility": " × ".join(
                str(lower) if lower == upper else f"{lower}...{upper}" for lower, upper in feature.shape_range
            ),
            "shapeRange": str([list(bounds) for bounds in feature.shape_range]),
        }
    if feature.enumerated_shapes:
        flexible = {
            "shapeFlexibility": " | ".join(" × ".join(map(str, shape)) for shape in feature.enumerated_shapes),
            "enumeratedShapes": str([list(shape) for shape in feature.enumerated_shapes]),
        }
    return {
        "name": feature.name,
        "type": "MultiArray",
        "dataType": feature.dtype,
        "shape": str(list(feature.shape)),
        "formattedType": f"MultiArray ({f'{feature.dtype} {sizes}'.rstrip()})",
        "shortDescription": feature.description,
        "isOptional": str(int(feature.optional)),
        "hasShapeFlexibility": str(int(bool(flexible))),
        **flexible,
    }


def _stored(operation: Operation) -> Iterator[str]:
    """Names of the forms in which an operation keeps values in a weight file."""
    blobs = [value for _, value in operation.values if isinstance(value.data, Blob)]
    if not blobs:
        return
    bits = palette_bits(operation)
    if bits is not None:
        yield f"Palettized ({bits} bits)"
    elif operation.type == "constexpr_affine_dequantize":
        yield "Int8"
    if "sparse" in operation.type:
        yield "Sparse"
    if operation.type == "const":
        yield from (_stored_name(value) for value in blobs)


def _stored_name(value: Value) -> str:
    # What is no tensor in a weight file is bytes.
    kind = value.type.dtype if isinstance(value.type, TensorType) else DType.UINT8
    return kind.value.replace("fp", "Float").replace("uint", "UInt").replace("int", "Int")


def _joined(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"Mixed ({', '.join(ordered)})" if len(ordered) > 1 else "".join(ordered)
