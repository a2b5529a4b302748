"""A Program as MIL text, the form of ``model.mil`` in compiled models, byte for byte as Apple's compiler prints it.

Two dialects exist. In 1.0 every scalar is a tensor of rank 0 (``tensor<int32, []>(3)``); in 1.3 scalars are bare
(``int32(3)``). Operands, attributes and functions are sorted by name; what the format's samples do not show (nested
blocks, NaN) is refused by name.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.program import (
    Blob,
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

OPSETS = {"CoreML5": "ios15", "CoreML6": "ios16", "CoreML7": "ios17", "CoreML8": "ios18", "CoreML9": "ios26"}
"""A function's opset and how the text spells it."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_@]*")
_RESERVED = frozenset({"program", "func", "tensor", "list", "tuple", "dict", "state", "true", "false", "inf"})
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})
_BRACKETS: Mapping[type, tuple[str, str]] = {TupleType: ("(", ")"), DictType: ("{", "}")}
_DTYPES = frozenset(dtype.value for dtype in DType)
_STRING = TensorType(DType.STRING)
_UINT64 = TensorType(DType.UINT64)


class Dialect(enum.Enum):
    """The value is what ``program(...)`` says in the first line."""

    V1_0 = "1.0"
    V1_3 = "1.3"


def program_text(program: Program, dialect: Dialect) -> str:
    """The text of ``model.mil``. Raises UnsupportedError for what MIL text is not known to express."""
    return "".join(_Printer(dialect).pieces(program))


class _Printer:
    """Remembers the text of types, of which a program has few and uses many times."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._types: dict[ValueType, str] = {}

    def pieces(self, program: Program) -> Iterator[str]:
        yield f"program({self._dialect.value})\n"
        if program.attributes:
            yield f"{self.attributes(program.attributes)}\n"
        yield "{\n"
        for name, function in sorted(program.functions.items()):
            yield from self.function(name, function)
        yield "}"

    def function(self, name: str, function: Function) -> Iterator[str]:
        where = f"function {name}"
        if function.opset not in OPSETS:
            raise UnsupportedError(f"{where}: opset {function.opset!r}: expected one of {', '.join(OPSETS)}")
        block = function.block
        if block.inputs or block.attributes:
            raise UnsupportedError(f"{where}: its block has inputs or attributes, which MIL text does not express")
        inputs = ", ".join(self.variable(variable) for variable in function.inputs)
        attributes = f" {self.attributes(function.attributes)}" if function.attributes else ""
        yield f"    func {_identifier(name)}<{OPSETS[function.opset]}>({inputs}){attributes} {{\n"
        for operation in block.operations:
            yield self.operation(operation, where)
        yield f"        }} -> ({', '.join(map(_identifier, block.outputs))});\n"

    def operation(self, operation: Operation, where: str) -> str:
        if operation.blocks:
            raise UnsupportedError(f"{where}: {operation.type} has nested blocks, whose MIL text is not known")
        outputs = ", ".join(map(self.variable, operation.outputs))
        inputs = ", ".join(
            f"{_identifier(key)} = {self.bindings(bindings)}" for key, bindings in sorted(operation.inputs.items())
        )
        attributes = self.attributes(operation.attributes) if operation.attributes else ""
        equals = " = " if outputs else ""
        return f"            {outputs}{equals}{_identifier(operation.type)}({inputs}){attributes};\n"

    def bindings(self, bindings: tuple[str | Value, ...]) -> str:
        texts = [_identifier(item) if isinstance(item, str) else self.literal(item) for item in bindings]
        return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"

    def attributes(self, attributes: Mapping[str, Value]) -> str:
        pairs = (f"{_identifier(key)} = {self.literal(value)}" for key, value in sorted(attributes.items()))
        return f"[{', '.join(pairs)}]"

    def variable(self, variable: Variable) -> str:
        return f"{self.type(variable.type)} {_identifier(variable.name)}"

    def type(self, kind: ValueType) -> str:
        text = self._types.get(kind)
        if text is None:
            text = self._types[kind] = self._type(kind)
        return text

    def _type(self, kind: ValueType) -> str:
        match kind:
            case TensorType(dtype, ()) if self._dialect is Dialect.V1_3:
                return dtype.value
            case TensorType(dtype, shape):
                return f"tensor<{dtype.value}, [{', '.join('?' if n is None else str(n) for n in shape)}]>"
            case ListType(element, length):
                return f"list<{self.type(element)}, {'?' if length is None else length}>"
            case TupleType(elements):
                return f"tuple<{', '.join(map(self.type, elements))}>"
            case DictType(key, value):
                return f"dict<{self.type(key)}, {self.type(value)}>"
            case StateType(wrapped):
                return f"state<{self.type(wrapped)}>"

    def literal(self, value: Value) -> str:
        return f"{self.type(value.type)}({self.payload(value)})"

    def payload(self, value: Value) -> str:
        data = value.data
        if isinstance(data, str):
            return quoted(data)
        if isinstance(data, Blob):
            path, offset = Value(_STRING, data.path), Value(_UINT64, np.asarray(data.offset, np.uint64))
            return f"BLOBFILE(path = {self.literal(path)}, offset = {self.literal(offset)})"
        if isinstance(data, np.ndarray):
            return _nested(_elements(data), data.shape)
        items = [self.payload(item) if isinstance(item, Value) else self.entry(item) for item in data]
        opening, closing = _BRACKETS.get(type(value.type), ("[", "]"))
        return f"{opening}{', '.join(items)}{closing}"

    def entry(self, pair: tuple[Value, Value]) -> str:
        return f"{{{self.payload(pair[0])}, {self.payload(pair[1])}}}"


def _identifier(name: str) -> str:
    if not _IDENTIFIER.fullmatch(name):
        raise UnsupportedError(f"name {name!r} cannot stand in MIL text: expected letters, digits, _ and @")
    if name in _RESERVED or name in _DTYPES:
        raise UnsupportedError(f"name {name!r} is a word of MIL text: rename it in the model")
    return name


def quoted(text: str) -> str:
    """A string literal. The samples have no escapes; backslashes are what every known reader takes."""
    return f'"{text.translate(_ESCAPES)}"'


def float_text(number: float) -> str:
    """C99's hexadecimal form with the shortest mantissa: 1.5 -> 0x1.8p+0. Raises UnsupportedError for NaN."""
    if math.isinf(number):
        return "inf" if number > 0 else "-inf"
    if math.isnan(number):
        raise UnsupportedError("NaN in a literal: how MIL text spells it is not known")
    mantissa, _, exponent = number.hex().partition("p")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}p{exponent}"


def _elements(array: np.ndarray) -> list[str]:
    flat = array.reshape(-1).tolist()
    match array.dtype.kind:
        case "b":
            return ["true" if item else "false" for item in flat]
        case "f":
            return [float_text(item) for item in flat]
        case "O":
            return [quoted(item) for item in flat]
        case _:
            return [str(item) for item in flat]


def _nested(items: list[str], shape: tuple[int, ...]) -> str:
    """Bracket a flat list of elements to ``shape``, from the innermost dimension out; rank 0 stays bare."""
    for axis in reversed(range(len(shape))):
        size, count = shape[axis], math.prod(shape[:axis])
        items = [f"[{', '.join(items[i * size : (i + 1) * size])}]" for i in range(count)]
    return items[0]
