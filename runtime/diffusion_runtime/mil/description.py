"""A model's description (inputs, outputs, metadata) <-> frozen values. Touches protobuf, as ``proto.py`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_runtime.coremltools_import import import_messages
from diffusion_runtime.errors import PackageError
from diffusion_runtime.mil import wire
from diffusion_runtime.mil.program import Feature, FunctionInterface, Metadata

# ArrayDataType of FeatureTypes.proto: 0x10000 is float, 0x20000 integer, and the rest the number of bits.
_ELEMENTS = {65568: "Float32", 65600: "Double", 131104: "Int32", 65552: "Float16", 131080: "Int8"}
_ELEMENT_CODES = {name: code for code, name in _ELEMENTS.items()}
# ColorSpace of its ImageFeatureType.
_COLOUR_SPACES = {10: "Grayscale", 20: "RGB", 30: "BGR", 40: "GrayscaleFloat16"}
_KINDS = {
    "int64Type": "int64",
    "doubleType": "double",
    "stringType": "string",
    "dictionaryType": "dictionary",
    "sequenceType": "sequence",
}
# Of a ModelDescription, and of the Metadata in it.
_METADATA_FIELD, _USER_DEFINED_FIELD = 100, 100

Parts = tuple[tuple[FunctionInterface, ...], Metadata, str]


def parse(data: bytes) -> Parts:
    """Interfaces, metadata and default function of a serialised ModelDescription. PackageError if damaged."""
    from google.protobuf.message import DecodeError

    try:
        spec = import_messages("Model_pb2").ModelDescription.FromString(data)
        user_defined = wire.string_map(wire.payload(data, _METADATA_FIELD), _USER_DEFINED_FIELD)
    except (DecodeError, ValueError) as error:
        raise PackageError(f"the model's description is damaged: {error}") from error
    metadata = Metadata(
        description=spec.metadata.shortDescription,
        version=spec.metadata.versionString,
        author=spec.metadata.author,
        license=spec.metadata.license,
        user_defined=user_defined,
    )
    described = [(item.name, item) for item in spec.functions] or [("main", spec)]
    return tuple(_interface(name, item) for name, item in described), metadata, spec.defaultFunctionName


def serialize(
    interfaces: Sequence[FunctionInterface], metadata: Metadata | None = None, default_function: str = ""
) -> bytes:
    """A ModelDescription that says this, the same bytes each time.

    Raises ValueError for features other than multi-arrays and states: their source's own bytes must be kept.
    """
    pb = import_messages("Model_pb2")
    spec = pb.ModelDescription(defaultFunctionName=default_function)
    for interface in interfaces:
        target = spec.functions.add(name=interface.name) if default_function else spec
        for features, field in (
            (interface.inputs, target.input),
            (interface.outputs, target.output),
            (interface.states, target.state),
        ):
            for feature in features:
                _fill_feature(field.add(), feature)
    described: bytes = spec.SerializeToString(deterministic=True)
    return described + wire.message_field(_METADATA_FIELD, _metadata(metadata or Metadata()))


def canonical(data: bytes) -> bytes:
    """The same ModelDescription with fields and map entries in order and its metadata present, as compilers do.

    Raises PackageError if damaged.
    """
    from google.protobuf.message import DecodeError

    try:
        spec = import_messages("Model_pb2").ModelDescription.FromString(data)
    except DecodeError as error:
        raise PackageError(f"the model's description is damaged: {error}") from error
    spec.metadata.SetInParent()
    ordered: bytes = spec.SerializeToString(deterministic=True)
    return ordered


def _metadata(metadata: Metadata) -> bytes:
    spec = import_messages("Model_pb2").Metadata(
        shortDescription=metadata.description,
        versionString=metadata.version,
        author=metadata.author,
        license=metadata.license,
    )
    data: bytes = spec.SerializeToString(deterministic=True)
    # The map is written here, entry by entry: protobuf would sort it or leave its order to chance.
    return data + b"".join(
        wire.message_field(
            _USER_DEFINED_FIELD, wire.message_field(1, key.encode()) + wire.message_field(2, value.encode())
        )
        for key, value in metadata.user_defined.items()
    )


def _interface(name: str, spec: Any) -> FunctionInterface:
    return FunctionInterface(
        name=name,
        inputs=tuple(_feature(item) for item in spec.input),
        outputs=tuple(_feature(item) for item in spec.output),
        states=tuple(_feature(item) for item in spec.state),
    )


def _feature(spec: Any) -> Feature:
    kind = spec.type.WhichOneof("Type")
    optional, text = spec.type.isOptional, spec.shortDescription
    if kind in ("multiArrayType", "stateType"):
        array = spec.type.multiArrayType if kind == "multiArrayType" else spec.type.stateType.arrayType
        return Feature(
            name=spec.name,
            kind=kind.removesuffix("Type"),
            dtype=_ELEMENTS.get(array.dataType, ""),
            shape=tuple(array.shape),
            shape_range=tuple((item.lowerBound, item.upperBound) for item in array.shapeRange.sizeRanges),
            enumerated_shapes=tuple(tuple(item.shape) for item in array.enumeratedShapes.shapes),
            optional=optional,
            description=text,
        )
    if kind == "imageType":
        image = spec.type.imageType
        bounds = (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange)
        ranged = image.WhichOneof("SizeFlexibility") == "imageSizeRange"
        return Feature(
            name=spec.name,
            kind="image",
            dtype=_COLOUR_SPACES.get(image.colorSpace, ""),
            shape=(image.height, image.width),
            shape_range=tuple((item.lowerBound, item.upperBound) for item in bounds) if ranged else (),
            enumerated_shapes=tuple((item.height, item.width) for item in image.enumeratedSizes.sizes),
            optional=optional,
            description=text,
        )
    return Feature(name=spec.name, kind=_KINDS.get(kind or "", ""), optional=optional, description=text)


def _fill_feature(spec: Any, feature: Feature) -> None:
    spec.name = feature.name
    spec.shortDescription = feature.description
    spec.type.isOptional = feature.optional
    if feature.kind not in ("multiArray", "state"):
        raise ValueError(f"{feature.name}: a description of kind {feature.kind!r} cannot be built anew")
    array = spec.type.multiArrayType if feature.kind == "multiArray" else spec.type.stateType.arrayType
    array.dataType = _ELEMENT_CODES[feature.dtype]
    array.shape.extend(feature.shape)
    for lower, upper in feature.shape_range:
        array.shapeRange.sizeRanges.add(lowerBound=lower, upperBound=upper)
    for shape in feature.enumerated_shapes:
        array.enumeratedShapes.shapes.add(shape=shape)
