"""MIL text (``model.mil``) to a Program: recursive descent over regular expressions, one match per token group.

Reads what Apple's compiler prints and what third-party writers print (other white space, decimal floats, bare and
tensor-shaped scalars alike). Anything else is an error that names the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from diffusion_runtime.errors import PackageError, UnsupportedError
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
from diffusion_runtime.mil.text_literals import numbers_of, unescaped
from diffusion_runtime.mil.text_print import OPSETS, Dialect

_ID = r"[A-Za-z_][A-Za-z0-9_@]*"
_SCALARS = "|".join(sorted((dtype.value for dtype in DType), key=len, reverse=True))
_NAME = re.compile(rf"\s*({_ID})")
_KEY = re.compile(rf"\s*({_ID})\s*=")
_SIMPLE_ARGUMENT = re.compile(rf"\s*({_ID})\s*=\s*({_ID})\s*(?=[,)])")
_OPERAND = re.compile(rf"\s*({_ID})\s*(?=[,)])")
_OPERATOR = re.compile(rf"\s*({_ID})\s*\(")
_TENSOR = re.compile(r"\s*tensor\s*<\s*([a-z0-9]+)\s*,\s*\[([0-9?,\s]*)\]\s*>")
_SCALAR = re.compile(rf"\s*({_SCALARS})\b(?!\s*<)")
_COMPOUND = re.compile(r"\s*(list|tuple|dict|state)\s*<")
_BLOB = re.compile(
    r"\s*BLOBFILE\s*\(\s*path\s*=\s*(?:tensor\s*<\s*string\s*,\s*\[\s*\]\s*>|string)\s*\(\s*"
    r'"((?:[^"\\\n]|\\.)*)"\s*\)\s*,\s*offset\s*=\s*(?:tensor\s*<\s*uint64\s*,\s*\[\s*\]\s*>|uint64)'
    r"\s*\(\s*(\d{1,20})\s*\)\s*\)"
)
_STRING = re.compile(r'\s*"((?:[^"\\\n]|\\.)*)"')
_NUMBER = re.compile(r"\s*([-+0-9A-Za-z.]+)")
_ROW = re.compile(r"\s*\[([^\[\]()\"]*)\]")
_LENGTH = re.compile(r"\s*(\d+|\?)")
_HEADER = re.compile(r"\s*program\s*\(\s*([0-9.]+)\s*\)")
_FUNCTION = re.compile(rf"\s*func\s+({_ID})\s*<\s*([a-z0-9]+)\s*>")
_END = re.compile(r"\s*\Z")
_ARROW = re.compile(r"\s*\}\s*->")
_PUNCTUATION = {mark: re.compile(rf"\s*{re.escape(mark)}") for mark in "()[]{}<>,;="}
_OPSETS = {text: opset for opset, text in OPSETS.items()}
_DTYPES = {dtype.value: dtype for dtype in DType}
_MAX_DEPTH = 32

T = TypeVar("T")


def read_text(path: Path) -> Program:
    """The program in a ``model.mil`` file. Raises PackageError (with the line) or UnsupportedError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{path}: cannot be read as MIL text: {error}") from error
    return parse_text(text, str(path))


def parse_text(text: str, name: str = "MIL text") -> Program:
    """The program that ``text`` spells; ``name`` goes into errors."""
    return _Parser(text, name).program()


class _Parser:
    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._name = name
        self._position = 0
        self._depth = 0
        self._types: dict[str, TensorType] = {}

    def program(self) -> Program:
        version = self._expect(_HEADER, "program(VERSION)").group(1)
        if version not in {dialect.value for dialect in Dialect}:
            known = ", ".join(dialect.value for dialect in Dialect)
            raise UnsupportedError(f"{self._name}: MIL text of version {version}: expected one of {known}")
        attributes = self._attributes()
        self._mark("{")
        functions: dict[str, Function] = {}
        while not self._accept(_PUNCTUATION["}"]):
            name, function = self._function()
            if name in functions:
                raise self._error(f"only one function {name}")
            functions[name] = function
        self._expect(_END, "the end of the text")
        if not functions:
            raise PackageError(f"{self._name}: the program has no function")
        return Program(functions=functions, attributes=attributes)

    def _function(self) -> tuple[str, Function]:
        name, opset = self._expect(_FUNCTION, "func NAME<OPSET> or }").groups()
        if opset not in _OPSETS:
            raise UnsupportedError(f"{self._name}: opset {opset!r}: expected one of {', '.join(_OPSETS)}")
        self._mark("(")
        inputs = self._until(")", self._variable)
        attributes = self._attributes()
        self._mark("{")
        operations = []
        while not self._accept(_ARROW):
            operations.append(self._operation())
        self._mark("(")
        outputs = self._until(")", lambda: self._expect(_NAME, "an output's name").group(1))
        self._mark(";")
        block = Block(operations=tuple(operations), outputs=tuple(outputs))
        return name, Function(tuple(inputs), _OPSETS[opset], {_OPSETS[opset]: block}, attributes)

    def _operation(self) -> Operation:
        operator = self._accept(_OPERATOR)
        outputs: list[Variable] = []
        if operator is None:
            outputs.append(self._variable())
            while self._accept(_PUNCTUATION[","]):
                outputs.append(self._variable())
            self._mark("=")
            operator = self._expect(_OPERATOR, "an operation's type and (")
        inputs = self._once("operand", self._until(")", self._operand))
        attributes = self._attributes()
        if self._accept(_PUNCTUATION[";"]) is None:
            if self._accept(_PUNCTUATION["{"]) or self._accept(_PUNCTUATION["("]):
                where = f"{self._name}: line {self._line()}"
                raise UnsupportedError(f"{where}: {operator.group(1)} has nested blocks, which are not covered")
            raise self._error("; after an operation")
        return Operation(operator.group(1), inputs, tuple(outputs), attributes)

    def _operand(self) -> tuple[str, tuple[str | Value, ...]]:
        if simple := self._accept(_SIMPLE_ARGUMENT):  # nearly all are
            return simple.group(1), (simple.group(2),)
        return self._expect(_KEY, "an operand's name and =").group(1), self._bindings()

    def _bindings(self) -> tuple[str | Value, ...]:
        if self._accept(_PUNCTUATION["("]):
            return tuple(self._until(")", self._binding))
        return (self._binding(),)

    def _binding(self) -> str | Value:
        name = self._accept(_OPERAND)
        return name.group(1) if name else self._literal()

    def _attributes(self) -> dict[str, Value]:
        if not self._accept(_PUNCTUATION["["]):
            return {}
        return self._once("attribute", self._until("]", self._attribute))

    def _attribute(self) -> tuple[str, Value]:
        return self._expect(_KEY, "an attribute's name and =").group(1), self._literal()

    def _once(self, what: str, pairs: list[tuple[str, T]]) -> dict[str, T]:
        named = dict(pairs)
        if len(named) < len(pairs):
            names = [name for name, _ in pairs]
            raise self._error(f"{what} {next(name for name in names if names.count(name) > 1)} only once")
        return named

    def _variable(self) -> Variable:
        kind = self._type()
        return Variable(self._expect(_NAME, "a variable's name").group(1), kind)

    def _type(self) -> ValueType:
        if match := self._accept(_TENSOR):
            return self._tensor_type(match)
        if match := self._accept(_SCALAR):
            return TensorType(_DTYPES[match.group(1)])
        kind = self._expect(_COMPOUND, "a type").group(1)
        return self._nest(lambda: self._compound(kind))

    def _tensor_type(self, match: re.Match[str]) -> TensorType:
        known = self._types.get(match.group())
        if known is None:
            dtype, dimensions = match.groups()
            if dtype not in _DTYPES:
                raise self._error(f"an element type ({', '.join(_DTYPES)}), got {dtype}", match.start(1))
            parts = dimensions.split(",") if dimensions.strip() else []
            if len(parts) > _MAX_DEPTH:
                raise self._error(f"at most {_MAX_DEPTH} dimensions, got {len(parts)}", match.start(2))
            try:
                shape = tuple(None if part.strip() == "?" else int(part) for part in parts)
                known = self._types[match.group()] = TensorType(_DTYPES[dtype], shape)
            except ValueError as error:
                raise self._error(f"dimensions, got [{dimensions[:60]}]", match.start(2)) from error
            except PackageError as error:
                raise PackageError(f"{self._name}: line {self._line(match.start(2))}: {error}") from error
        return known

    def _compound(self, kind: str) -> ValueType:
        if kind == "tuple":
            return TupleType(tuple(self._until(">", self._type)))
        first = self._type()
        if kind == "state":
            self._mark(">")
            return StateType(first)
        self._mark(",")
        if kind == "list":
            length = self._expect(_LENGTH, "a length or ?").group(1)
            self._mark(">")
            return ListType(first, None if length == "?" else int(length))
        second = self._type()
        self._mark(">")
        return DictType(first, second)

    def _literal(self) -> Value:
        kind = self._type()
        self._mark("(")
        value = self._payload(kind)
        self._mark(")")
        return value

    def _payload(self, kind: ValueType) -> Value:
        match kind:
            case TensorType():
                return self._tensor(kind)
            case ListType(element, length):
                self._mark("[")
                items = self._nest(lambda: self._until("]", lambda: self._payload(element)))
                if length is not None and length != len(items):
                    raise self._error(f"{length} elements of a list, got {len(items)}")
                return Value(kind, tuple(items))
            case TupleType(elements):
                return Value(kind, self._nest(lambda: self._tuple(elements)))
            case DictType():
                self._mark("{")
                return Value(kind, tuple(self._nest(lambda: self._until("}", lambda: self._entry(kind)))))
            case StateType():
                raise self._error("no literal of a state")

    def _tuple(self, kinds: tuple[ValueType, ...]) -> tuple[Value, ...]:
        self._mark("(")
        items = []
        for index, kind in enumerate(kinds):
            if index:
                self._mark(",")
            items.append(self._payload(kind))
        self._mark(")")
        return tuple(items)

    def _entry(self, kind: DictType) -> tuple[Value, Value]:
        self._mark("{")
        key = self._payload(kind.key)
        self._mark(",")
        value = self._payload(kind.value)
        self._mark("}")
        return key, value

    def _tensor(self, kind: TensorType) -> Value:
        if blob := self._accept(_BLOB):
            return Value(kind, Blob(unescaped(blob.group(1)), int(blob.group(2))))
        start = self._position
        shape: tuple[int, ...]
        if kind.dtype is DType.STRING:
            return self._strings(kind, start)
        if len(kind.shape) == 1 and (row := self._accept(_ROW)):
            body = row.group(1)
            items = body.split(",") if body.strip() else []
            numbers, shape = self._numbers(items, kind.dtype, start), (len(items),)
        else:
            found: list[str] = []
            shape = self._nested(len(kind.shape), found, lambda: self._expect(_NUMBER, "a number").group(1))
            numbers = self._numbers(found, kind.dtype, start)
        self._check_shape(kind, shape, start)
        return Value(kind, numbers.reshape(self._full(kind, shape)))

    def _strings(self, kind: TensorType, start: int) -> Value:
        found: list[str] = []
        shape = self._nested(
            len(kind.shape), found, lambda: unescaped(self._expect(_STRING, "a quoted string").group(1))
        )
        self._check_shape(kind, shape, start)
        if not kind.shape:
            return Value(kind, found[0])
        array = np.empty(len(found), object)
        array[:] = found
        return Value(kind, array.reshape(self._full(kind, shape)))

    def _nested(self, rank: int, found: list[str], element: Callable[[], str]) -> tuple[int, ...]:
        """Append the elements of ``rank`` nested brackets to ``found``; return the shape that they have."""
        if rank == 0:
            found.append(element())
            return ()
        self._mark("[")
        rows = self._until("]", lambda: self._nested(rank - 1, found, element))
        if any(row != rows[0] for row in rows):
            raise self._error("rows of one length")
        return (len(rows), *(rows[0] if rows else ()))

    def _full(self, kind: TensorType, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``shape`` may end early at an empty dimension; the type has the rest."""
        return shape + tuple(n or 0 for n in kind.shape[len(shape) :])

    def _check_shape(self, kind: TensorType, shape: tuple[int, ...], start: int) -> None:
        full = self._full(kind, shape)
        if any(want is not None and want != got for want, got in zip(kind.shape, full, strict=True)):
            raise self._error(f"a literal of shape {list(kind.shape)}, got {list(full)}", start)

    def _numbers(self, items: list[str], dtype: DType, start: int) -> np.ndarray:
        try:
            return numbers_of(items, dtype)
        except (ValueError, OverflowError, KeyError) as error:
            raise self._error(f"values of {dtype.value}, got {', '.join(items)[:60]}", start) from error

    def _until(self, end: str, item: Callable[[], T]) -> list[T]:
        """Items separated by commas up to the closing mark ``end``, the opening one being read."""
        items: list[T] = []
        if self._accept(_PUNCTUATION[end]):
            return items
        while True:
            items.append(item())
            if not self._accept(_PUNCTUATION[","]):
                self._mark(end)
                return items

    def _nest(self, inner: Callable[[], T]) -> T:
        """Bounds the recursion, so that hostile text is an error and no RecursionError."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"at most {_MAX_DEPTH} nested types or values")
        result = inner()
        self._depth -= 1
        return result

    def _accept(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._position)
        if match:
            self._position = match.end()
        return match

    def _expect(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        match = self._accept(pattern)
        if not match:
            raise self._error(what)
        return match

    def _mark(self, mark: str) -> None:
        if not self._accept(_PUNCTUATION[mark]):
            raise self._error(repr(mark))

    def _line(self, position: int | None = None) -> int:
        return self._text.count("\n", 0, self._position if position is None else position) + 1

    def _error(self, expected: str, position: int | None = None) -> PackageError:
        start = self._position if position is None else position
        while start < len(self._text) and self._text[start].isspace():
            start += 1
        got = self._text[start : start + 40].split("\n")[0]
        return PackageError(f"{self._name}: line {self._line(start)}: expected {expected}, got {got!r}")
