"""Runs pickle's programs without what could do harm, in time and memory that grow with their bytes."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any, ClassVar

MAX_ARGUMENTS = 16
"""Of one call; torch's have up to seven. Without a bound, many calls with one long tuple would take for ever."""
REFUSED = frozenset(
    code[0]
    for code in (
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4),  # look into a registry of the process
        *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.BYTEARRAY8),  # the last allocates before it reads
    )
)
MALFORMED = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the interpreter raises for a program that makes no sense."""


class Items(dict[object, object]):
    """A dict of any kind. Keys that are not plain are left out: the hash of nested tuples can take for ever."""

    __slots__ = ()

    def __setitem__(self, key: object, value: object) -> None:
        if isinstance(key, str | int | float):
            super().__setitem__(key, value)


class Parameters(Items):
    """torch's ParameterDict, whose parameters are among its attributes."""

    __slots__ = ()


class Inert:
    """See `INERT`."""

    __slots__ = ()


INERT = Inert()
"""What every class, function and object that is not known becomes: one object, to which nothing can be done."""


class Interpreter(pickle._Unpickler):
    """pickle's interpreter in Python, with every operation that hashes, calls, fills or imports replaced. What is
    left moves numbers, texts, tuples and lists about. (The one in C hashes the keys of its dicts by itself.)

    A subclass says what names and references mean, in ``find_class`` and ``persistent_load``. What `find_class`
    gives is all that a program can call.
    """

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, program: BytesIO) -> None:
        # Texts of Python 2 are bytes in a pickle: the encoding is for those.
        super().__init__(program, encoding="utf-8", errors="replace")

    def _call(self, function: object, arguments: object) -> None:
        """Push what a call makes: of a function of this file, or `INERT`."""
        known = callable(function) and isinstance(arguments, tuple) and len(arguments) <= MAX_ARGUMENTS
        self.append(function(*arguments) if known else INERT)  # type: ignore[operator,misc]

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._call(function, arguments)

    def _new_with_keywords(self) -> None:
        del self.stack[-3:]
        self.append(INERT)

    def _instance(self) -> None:
        """A class named in the program's text, and what lies on the stack since the mark."""
        self.readline(), self.readline(), self.pop_mark()
        self.append(INERT)

    def _object(self) -> None:
        function, *arguments = self.pop_mark()
        self._call(function, tuple(arguments))

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _extend(self, items: list[object]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def _fill(self, items: list[object]) -> None:
        if isinstance(target := self.stack[-1], Items):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key] = value

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append(Items())
        self._fill(items)

    def _build(self) -> None:
        """Attributes are dropped, except those that hold weights."""
        state = self.stack.pop()
        target = self.stack[-1]
        held = state.get("_parameters") if isinstance(target, Parameters) and isinstance(state, Items) else None
        if isinstance(held, Items):
            for key, value in held.items():
                target[key] = value

    def _frozenset(self) -> None:
        self.pop_mark()
        self.append(INERT)

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: run for code, run in pickle._Unpickler.dispatch.items() if code not in REFUSED},
        pickle.EMPTY_DICT[0]: lambda self: self.append(Items()),
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: lambda self: self._fill(self.pop_mark()),
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,  # a class and its arguments, as a function and its own
        pickle.NEWOBJ_EX[0]: _new_with_keywords,
        pickle.BUILD[0]: _build,
        pickle.OBJ[0]: _object,
        pickle.INST[0]: _instance,
        pickle.EMPTY_SET[0]: lambda self: self.append(INERT),  # no weights are in sets
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.FROZENSET[0]: _frozenset,
    }
