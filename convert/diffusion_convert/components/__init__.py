"""The submodules that can be converted, one file each.

To add one: a file here with a Component of the file's name in capitals, and an entry of its name in
`diffusion_runtime.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from diffusion_convert.components.component import Component
from diffusion_runtime.families import COMPONENTS


def table() -> Mapping[str, Component]:
    """All components by name, in the order in which they are converted."""
    return {name: getattr(import_module(f"{__name__}.{name}"), name.upper()) for name in COMPONENTS}
