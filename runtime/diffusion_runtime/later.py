"""Imports that a picture does not need, put off until something needs them.

Half of the time until the first step of a small model went into them: torch's compiler, which diffusers and torch
import to say that a function is none of its business, sympy, which torch imports to ask whether a size is a number,
and scipy's statistics and integrals, of which two schedulers use a function each, where they are told to. A list of
all installed files, which diffusers makes, is put off, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
FOR_SCHEDULERS = ("scipy.stats", "scipy.integrate")


def _itself(value: Any) -> Any:
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


WITHOUT_SYMBOLS: Mapping[str, Mapping[str, Any]] = {
    "sympy": {"Basic": type("Basic", (), {})},  # of which nothing is an instance
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(
            (
                *("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"),
                *("guarding_hint_or_throw", "statically_known_true"),
            ),
            _itself,
        ),
        "has_guarding_hint": lambda _: True,
        "is_nested_int": lambda _: False,
        "sym_eq": _equal,
        "sym_and": lambda *values: all(values),
        "sym_or": lambda *values: any(values),
    },
}
"""What torch's functions for meta tensors ask of sizes, answered for those that are numbers: all are, as long as
sympy is not there."""


def import_diffusers() -> ModuleType:
    """diffusers, without the modules above, unless they are there already."""
    if "diffusers" not in sys.modules:
        for name in FOR_SCHEDULERS:
            if name not in sys.modules and importlib.util.find_spec("scipy") is not None:
                _Later(name, {}).put()
    listed = metadata.packages_distributions
    metadata.packages_distributions = lambda: _Distributions(listed)
    try:
        with no_compiler():
            return importlib.import_module("diffusers")
    finally:
        metadata.packages_distributions = listed


class _Distributions(Mapping[str, list[str]]):
    """Which distributions each package is of. The lists of all installed files are read for it, and diffusers asks
    it of three packages that are hardly ever there."""

    def __init__(self, find: Callable[[], Mapping[str, list[str]]]) -> None:
        self._find = find

    @cached_property
    def _found(self) -> Mapping[str, list[str]]:
        return self._find()

    def __getitem__(self, name: str) -> list[str]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@contextmanager
def no_compiler() -> Iterator[None]:
    """In this context, what torch says only to its compiler is not said, instead of importing it for that. Then all
    is as it was."""
    left_alone: list[Any] = []

    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        left_alone.append(function)
        return function

    contents = {COMPILER: {"disable": disable, "allow_in_graph": lambda function: function}, **WITHOUT_SYMBOLS}
    stand_ins = [_Later(name, content) for name, content in contents.items() if name not in sys.modules]
    for stand_in in stand_ins:
        stand_in.put()
    try:
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.remove()
        for function in left_alone:  # torch remembers what it was answered
            vars(function).pop("__dynamo_disable", None)


class _Later(ModuleType):
    """A module that is imported when something of it is asked for that is not in ``content``.

    Not importlib's LazyLoader: an import statement asks a module for its ``__spec__``, which that takes for a use.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.find_spec(name)
        if self.__spec__ is not None:
            self.__file__ = self.__spec__.origin  # `inspect` asks every module
            if content:  # `from … import` asks for the path, too
                self.__path__ = self.__spec__.submodule_search_locations or []
        vars(self).update(content)

    def __getattr__(self, name: str) -> Any:
        self.remove()
        return getattr(importlib.import_module(self.__name__), name)

    def put(self) -> None:
        sys.modules[self.__name__] = self
        parent, _, child = self.__name__.rpartition(".")
        if parent:
            setattr(importlib.import_module(parent), child, self)

    def remove(self) -> None:
        parent, _, child = self.__name__.rpartition(".")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        if parent and vars(sys.modules[parent]).get(child) is self:
            delattr(sys.modules[parent], child)
