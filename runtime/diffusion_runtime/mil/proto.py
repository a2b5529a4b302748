"""Core ML's protobuf messages <-> frozen values. Protobuf is touched here, in ``proto_tensors.py`` and in
``description.py``.

A serialised description is kept verbatim (``Model.description``). Maps whose order protobuf does not define
(inputs, attributes, functions) are sorted by key, so that equal files give equal and equally ordered programs. Doc
strings of single values are not kept; nothing that coremltools writes has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusion_runtime.coremltools_import import import_messages
from diffusion_runtime.errors import PackageError, UnsupportedError
from diffusion_runtime.mil import wire
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.program import (
    Blob,
    Block,
    DictType,
    DType,
    Function,
    ListType,
    Operation,
    Program,
    StateType,
    TensorType,
    TupleType,
    Value,
    ValueType,
    Variable,
)
from diffusion_runtime.mil.proto_tensors import fill_tensor, tensor_from_proto

# Numbers of MIL.proto's DataType. Types of fewer than 8 bits came with iOS 18.
_CODES = {
    DType.BOOL: 1,
    DType.STRING: 2,
    DType.FLOAT16: 10,
    DType.FLOAT32: 11,
    DType.FLOAT64: 12,
    DType.INT8: 21,
    DType.INT16: 22,
    DType.INT32: 23,
    DType.INT64: 24,
    DType.INT4: 25,
    DType.UINT8: 31,
    DType.UINT16: 32,
    DType.UINT32: 33,
    DType.UINT64: 34,
    DType.UINT4: 35,
    DType.UINT2: 36,
    DType.UINT1: 37,
    DType.UINT6: 38,
    DType.UINT3: 39,
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
# Fields of Core ML's Model message. It is put together from its parts here: protobuf would write the description's
# map of user metadata in an order of its own, and what this protobuf schema does not know would be lost.
_VERSION, _DESCRIPTION, _UPDATABLE = 1, 2, 10
ML_PROGRAM = 502
"""The number of the field that holds an ML Program. Compiled models name their kind by it."""


def read_model(path: Path) -> Model:
    """The model of a specification file (``model.mlmodel``).

    Raises PackageError for a file that is missing, truncated or damaged, UnsupportedError for a model of another
    kind (a neural network, a pipeline) or a program with values that have no meaning here.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path}: the model specification cannot be read: {error.strerror}") from error
    try:
        return model_from_bytes(data)
    except (PackageError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error


def model_from_bytes(data: bytes) -> Model:
    """As ``read_model``, of the file's bytes."""
    from google.protobuf.message import DecodeError

    try:
        spec = import_messages("Model_pb2").Model.FromString(data)
        described = wire.payload(data, _DESCRIPTION)
    except (DecodeError, ValueError) as error:
        raise PackageError(f"not a Core ML model, or truncated ({len(data)} bytes): {error}") from error
    kind = spec.WhichOneof("Type")
    if kind is None:
        raise PackageError(f"not a Core ML model, or truncated ({len(data)} bytes): it holds no model")
    if kind != "mlProgram":
        raise UnsupportedError(f"a model of kind {kind}, expected an ML Program; convert it anew as an ML Program")
    return Model(spec.specificationVersion, program_from_proto(spec.mlProgram), described, spec.isUpdatable)


def model_to_bytes(model: Model) -> bytes:
    """The specification file's bytes; the same model always gives the same bytes."""
    program = program_to_proto(model.program).SerializeToString(deterministic=True)
    updatable = wire.varint_field(_UPDATABLE, 1) if model.is_updatable else b""
    head = wire.varint_field(_VERSION, model.specification_version)
    described = wire.message_field(_DESCRIPTION, model.description)
    # In the order of the fields' numbers, as protobuf writes them.
    return head + described + updatable + wire.message_field(ML_PROGRAM, program)


def write_model(model: Model, path: Path) -> None:
    """Write a specification file."""
    path.write_bytes(model_to_bytes(model))


def program_from_proto(spec: Any) -> Program:
    """``spec`` is a ``MIL_pb2.Program``."""
    return Program(
        functions={name: _function(name, spec.functions[name]) for name in sorted(spec.functions)},
        version=spec.version,
        attributes=_values(spec.attributes),
        doc_string=spec.docString,
    )


def program_to_proto(program: Program) -> Any:
    """A ``MIL_pb2.Program``."""
    mil = import_messages("MIL_pb2")
    spec = mil.Program(version=program.version, docString=program.doc_string)
    for name, function in program.functions.items():
        _fill_function(spec.functions[name], function)
    _fill_values(spec.attributes, program.attributes)
    return spec


# --- protobuf -> values


def _function(name: str, spec: Any) -> Function:
    if spec.opset not in spec.block_specializations:
        found = ", ".join(sorted(spec.block_specializations)) or "none"
        raise PackageError(f"function {name!r} has no block for its opset {spec.opset!r} (blocks: {found})")
    return Function(
        inputs=tuple(_variable(item) for item in spec.inputs),
        opset=spec.opset,
        blocks={opset: _block(spec.block_specializations[opset]) for opset in sorted(spec.block_specializations)},
        attributes=_values(spec.attributes),
    )


def _block(spec: Any) -> Block:
    return Block(
        operations=tuple(_operation(item) for item in spec.operations),
        outputs=tuple(spec.outputs),
        inputs=tuple(_variable(item) for item in spec.inputs),
        attributes=_values(spec.attributes),
    )


def _operation(spec: Any) -> Operation:
    try:
        return Operation(
            type=spec.type,
            inputs={name: _bindings(spec.inputs[name]) for name in sorted(spec.inputs)},
            outputs=tuple(_variable(item) for item in spec.outputs),
            attributes=_values(spec.attributes),
            blocks=tuple(_block(item) for item in spec.blocks),
        )
    except (PackageError, UnsupportedError) as error:
        where = f"operation {spec.type} {spec.outputs[0].name if spec.outputs else ''}".rstrip()
        raise type(error)(f"{where}: {error}") from error


def _bindings(spec: Any) -> tuple[str | Value, ...]:
    return tuple(
        binding.name if binding.WhichOneof("binding") == "name" else _value(binding.value)
        for binding in spec.arguments
    )


def _variable(spec: Any) -> Variable:
    return Variable(spec.name, _type(spec.type))


def _values(spec: Any) -> dict[str, Value]:
    return {name: _value(spec[name]) for name in sorted(spec)}


def _type(spec: Any) -> ValueType:
    return _type_of_bytes(spec.SerializeToString())


@lru_cache(maxsize=4096)
def _type_of_bytes(data: bytes) -> ValueType:
    """Of the ten thousand types in a program a hundred differ: equal ones are one value, and read once."""
    spec = import_messages("MIL_pb2").ValueType.FromString(data)
    kind = spec.WhichOneof("type")
    if kind == "tensorType":
        return _tensor_type(spec.tensorType)
    if kind == "listType":
        return ListType(_type(spec.listType.type), _dimension(spec.listType.length))
    if kind == "tupleType":
        return TupleType(tuple(_type(item) for item in spec.tupleType.types))
    if kind == "dictionaryType":
        return DictType(_type(spec.dictionaryType.keyType), _type(spec.dictionaryType.valueType))
    if kind == "stateType":
        return StateType(_type(spec.stateType.wrappedType))
    raise PackageError("a value without a type")


def _tensor_type(spec: Any) -> TensorType:
    if spec.dataType not in _DTYPES:
        names = import_messages("MIL_pb2").DataType
        name = names.Name(spec.dataType) if spec.dataType in names.values() else f"number {spec.dataType}"
        raise UnsupportedError(f"element type {name} is not covered")
    if spec.rank != len(spec.dimensions):
        raise UnsupportedError(f"a tensor type of rank {spec.rank} with {len(spec.dimensions)} dimensions")
    if spec.attributes:
        raise UnsupportedError(f"attributes of a tensor type: {', '.join(sorted(spec.attributes))}")
    return TensorType(_DTYPES[spec.dataType], tuple(_dimension(item) for item in spec.dimensions))


def _dimension(spec: Any) -> int | None:
    if spec.WhichOneof("dimension") == "constant":
        return int(spec.constant.size)
    if spec.unknown.variadic:
        raise UnsupportedError("a variadic dimension")
    return None


def _value(spec: Any) -> Value:
    kind = _type(spec.type)
    if spec.WhichOneof("value") == "blobFileValue":
        return Value(kind, Blob(spec.blobFileValue.fileName, spec.blobFileValue.offset))
    immediate = spec.immediateValue
    if isinstance(kind, TensorType):
        return Value(kind, tensor_from_proto(immediate.tensor, kind))
    if isinstance(kind, ListType):
        return Value(kind, tuple(_value(item) for item in immediate.list.values))
    if isinstance(kind, TupleType):
        return Value(kind, tuple(_value(item) for item in immediate.tuple.values))
    if isinstance(kind, DictType):
        return Value(kind, tuple((_value(item.key), _value(item.value)) for item in immediate.dictionary.values))
    raise UnsupportedError("a literal state")


# --- values -> protobuf


def _fill_function(spec: Any, function: Function) -> None:
    spec.opset = function.opset
    for variable in function.inputs:
        _fill_variable(spec.inputs.add(), variable)
    for opset, block in function.blocks.items():
        _fill_block(spec.block_specializations[opset], block)
    _fill_values(spec.attributes, function.attributes)


def _fill_block(spec: Any, block: Block) -> None:
    for variable in block.inputs:
        _fill_variable(spec.inputs.add(), variable)
    spec.outputs.extend(block.outputs)
    for operation in block.operations:
        _fill_operation(spec.operations.add(), operation)
    _fill_values(spec.attributes, block.attributes)


def _fill_operation(spec: Any, operation: Operation) -> None:
    spec.type = operation.type
    for name, bindings in operation.inputs.items():
        argument = spec.inputs[name]
        for binding in bindings:
            if isinstance(binding, str):
                argument.arguments.add().name = binding
            else:
                _fill_value(argument.arguments.add().value, binding)
    for variable in operation.outputs:
        _fill_variable(spec.outputs.add(), variable)
    _fill_values(spec.attributes, operation.attributes)
    for block in operation.blocks:
        _fill_block(spec.blocks.add(), block)


def _fill_values(spec: Any, values: Mapping[str, Value]) -> None:
    for name, value in values.items():
        _fill_value(spec[name], value)


def _fill_variable(spec: Any, variable: Variable) -> None:
    spec.name = variable.name
    _fill_type(spec.type, variable.type)


def _fill_type(spec: Any, kind: ValueType) -> None:
    if isinstance(kind, TensorType):
        spec.tensorType.dataType = _CODES[kind.dtype]
        spec.tensorType.rank = len(kind.shape)
        for size in kind.shape:
            _fill_dimension(spec.tensorType.dimensions.add(), size)
    elif isinstance(kind, ListType):
        _fill_type(spec.listType.type, kind.element)
        _fill_dimension(spec.listType.length, kind.length)
    elif isinstance(kind, TupleType):
        spec.tupleType.SetInParent()  # a tuple of nothing would be no type at all
        for element in kind.elements:
            _fill_type(spec.tupleType.types.add(), element)
    elif isinstance(kind, DictType):
        _fill_type(spec.dictionaryType.keyType, kind.key)
        _fill_type(spec.dictionaryType.valueType, kind.value)
    else:
        _fill_type(spec.stateType.wrappedType, kind.wrapped)


def _fill_dimension(spec: Any, size: int | None) -> None:
    if size is None:
        spec.unknown.variadic = False  # its default: written so that the dimension is there
    else:
        spec.constant.size = size


def _fill_value(spec: Any, value: Value) -> None:
    _fill_type(spec.type, value.type)
    data = value.data
    if isinstance(data, Blob):
        spec.blobFileValue.fileName = data.path
        spec.blobFileValue.offset = data.offset
    elif isinstance(value.type, TensorType):
        fill_tensor(spec.immediateValue.tensor, data, value.type.dtype)
    elif isinstance(value.type, DictType):
        spec.immediateValue.dictionary.SetInParent()
        for key, item in _items(data):
            pair = spec.immediateValue.dictionary.values.add()
            _fill_value(pair.key, key)
            _fill_value(pair.value, item)
    else:
        field = spec.immediateValue.list if isinstance(value.type, ListType) else spec.immediateValue.tuple
        field.SetInParent()  # an empty one is a value, too
        for item in _items(data):
            _fill_value(field.values.add(), item)


def _items(data: Any) -> Any:
    if not isinstance(data, tuple):
        raise ValueError(f"a list, tuple or dictionary holds a tuple, got {type(data).__name__}")
    return data
