"""The submodules that can be converted, one file each.

To add one: a file here with a Component of the file's name in capitals, and an entry of its name in
`diffusion_runtime.families`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component
from diffusion_runtime.families import COMPONENTS, kind_of, several


def table(networks: Iterable[str] = ()) -> Mapping[str, Component]:
    """All components by name, in the order in which they are converted; of a kind of which there are several, those
    among ``networks`` (`Checkpoint.models`)."""
    names = [name for kind in COMPONENTS for name in _names(kind, tuple(networks))]
    return {name: component(name) for name in names}


def component(name: str) -> Component:
    """The component of that name, or of that kind. Raises KeyError for one that there is not."""
    kind = kind_of(name)
    if kind not in COMPONENTS:
        raise KeyError(name)
    found: Component = getattr(import_module(f"{__name__}.{kind}"), kind.upper())
    return found.named(name)


def of_checkpoint(checkpoint: Checkpoint) -> Mapping[str, Component]:
    """The components that a checkpoint has."""
    return {
        name: one
        for name, one in table(checkpoint.models).items()
        if one.subfolder in checkpoint.models and one.is_in(checkpoint)
    }


def _names(kind: str, networks: tuple[str, ...]) -> Iterable[str]:
    return (kind,) if COMPONENTS[kind].several is None else several(kind, networks).values()
