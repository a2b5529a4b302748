"""Models of several functions: one of them as a model of its own, and models of one function as one of several.

From macOS 15 and iOS 18 on a package may hold several functions that share its weights. The description then lists
an interface for each, and names the one that runs where none is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffusion_runtime.errors import InputError, UnsupportedError
from diffusion_runtime.mil.description import serialize
from diffusion_runtime.mil.model import Model

FIRST_VERSION = 9
"""The specification that came with several functions: that of macOS 15 and iOS 18."""
MAIN = "main"
"""What the function of a model that describes no functions is called."""


def function_names(model: Model) -> tuple[str, ...]:
    """The functions that the description lists, the default one first; none where it is a model of one unnamed."""
    if not model.default_function:
        return ()
    names = {model.default_function: None} | {interface.name: None for interface in model.interfaces}
    return tuple(names)


def one_function(model: Model, name: str | None) -> Model:
    """``model`` with the function of that name alone, as models of one function are; None: the default one.

    Raises InputError, with the functions that there are, for an unknown name, UnsupportedError where
    the function takes or gives anything but multi-arrays."""
    names = function_names(model)
    if not names and name in (None, MAIN):
        return model
    name = name or model.default_function
    described = next((interface for interface in model.interfaces if interface.name == name), None)
    if described is None or name not in model.program.functions:
        raise InputError(f"no function {name!r}: the model has {', '.join(names or model.program.functions)}")
    try:
        description = serialize([replace(described, name=MAIN)], model.metadata)
    except ValueError as error:
        raise UnsupportedError(f"function {name}: {error}") from error
    program = replace(model.program, functions={MAIN: model.program.functions[name]})
    return replace(model, program=program, description=description)


def joined(models: Mapping[str, Model]) -> Model:
    """One model whose functions are those of ``models``, each of one function, by the names given; the first is the
    default. Stored values must lie in one weight file already. Metadata are the first model's.

    Raises InputError where models are for other systems, or for systems that know no functions."""
    first = next(iter(models.values()))
    versions = {model.specification_version for model in models.values()}
    if len(versions) > 1 or min(versions) < FIRST_VERSION:
        raise InputError(
            f"functions of specifications {', '.join(map(str, sorted(versions)))}: expected one, "
            f"{FIRST_VERSION} or later (macOS 15, iOS 18)"
        )
    program = replace(first.program, functions={name: models[name].function for name in sorted(models)})
    interfaces = [replace(model.interface, name=name) for name, model in models.items()]
    description = serialize(interfaces, first.metadata, next(iter(models)))
    return replace(first, program=program, description=description)
