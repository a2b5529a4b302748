"""Imports that a picture does not need, put off until something needs them.

Half of the time until the first step of a small model went into them: torch's compiler, which diffusers and torch
import to say that a function is none of its business, and scipy's statistics and integrals, of which two schedulers
use a function each, where they are told to.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
FOR_SCHEDULERS = ("scipy.stats", "scipy.integrate")


def import_diffusers() -> ModuleType:
    """diffusers, without the modules above, unless they are there already."""
    if "diffusers" not in sys.modules:
        for name in FOR_SCHEDULERS:
            if name not in sys.modules and importlib.util.find_spec("scipy") is not None:
                _Later(name, {}).put()
    with no_compiler():
        return importlib.import_module("diffusers")


@contextmanager
def no_compiler() -> Iterator[None]:
    """In this context, what torch says only to its compiler is not said, instead of importing it for that. Then all
    is as it was."""
    left_alone: list[Any] = []

    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        left_alone.append(function)
        return function

    content = {"disable": disable, "allow_in_graph": lambda function: function}
    stand_in = None if COMPILER in sys.modules else _Later(COMPILER, content)
    if stand_in is not None:
        stand_in.put()
    try:
        yield
    finally:
        if stand_in is not None:
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
        setattr(importlib.import_module(parent), child, self)

    def remove(self) -> None:
        parent, _, child = self.__name__.rpartition(".")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        if vars(sys.modules[parent]).get(child) is self:
            delattr(sys.modules[parent], child)
