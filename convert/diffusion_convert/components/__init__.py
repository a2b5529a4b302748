"""The submodules that can be converted, one file each. To add one: a file with a Component, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from diffusion_convert.checkpoint import Checkpoint
    from diffusion_convert.options import AttentionKind


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a converted model: name, shape, element type at the interface, description.

    ``traced_dtype`` is what the torch module receives: ``input_ids`` is float32 at the interface."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float16"
    description: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that a conversion is for. ``height`` and ``width`` are of the picture, in pixels."""

    height: int
    width: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Graph:
    """A component ready to be traced: a module that takes ``inputs`` in order and returns ``outputs`` in order.

    ``sample`` draws seeded inputs in the range that the model meets in use, for verification.
    """

    module: torch.nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sample: Callable[[int], Mapping[str, np.ndarray]]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Component:
    """One convertible submodule.

    ``subfolder`` is where diffusers keeps it; ``suffix`` and ``compiled_name`` are what existing apps look for;
    ``min_psnr_db`` is the bound below which nothing is published, against the torch module in float32.
    """

    name: str
    subfolder: str
    suffix: str
    compiled_name: str
    build: Callable[[Checkpoint, AttentionKind, Shape], Graph]
    min_psnr_db: float
    uses_attention: bool = False
    compute_units: Mapping[str, str] = field(default_factory=dict)
