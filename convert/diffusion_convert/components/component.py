"""What a convertible submodule is: interface, how it is built, and the bounds that it has to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.options import ConvertOptions
from diffusion_convert.verification.bounds import MIN_PSNR_DB
from diffusion_runtime.families import AttentionKind, kind_of, subfolder_of
from diffusion_runtime.picture_size import Size


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a converted model: name, shape, element type at the interface, description.

    Whatever the type at the interface, the torch module receives and gives float32. ``shapes``: all that an input
    may have, where there are several, ``shape`` the first of them; an output's shape may then follow from it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float16"
    description: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that a conversion is for. ``height`` and ``width`` are of the picture, in pixels.

    ``context_length`` is how many text tokens the UNet takes, a multiple of what the text encoder takes; None: as
    many."""

    height: int
    width: int
    batch_size: int
    context_length: int | None = None

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)


@dataclass(frozen=True, slots=True)
class Graph:
    """A component ready to be traced: a module that takes ``inputs`` in order and returns ``outputs`` in order, a
    tensor where there is one, else a tuple.

    ``sample`` draws seeded inputs in the range that the model meets in use, for verification. ``exact`` names
    torch modules whose operations stay in float32 whatever the precision.
    """

    module: torch.nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sample: Callable[[int], Mapping[str, np.ndarray]]
    description: str = ""
    exact: tuple[str, ...] = ()


Build = Callable[["Checkpoint", "AttentionKind | None", Shape], Graph]
"""Builds a component on the tensors that the checkpoint gives, whatever they are: real ones as stored, or
placeholders (`export.placeholders`), which must reach the traced module as they are or reshaped, never
transposed, concatenated or computed with. For None, the module is as its library built it: what the others are
verified against."""


@dataclass(frozen=True, slots=True)
class Component:
    """One convertible submodule.

    ``min_psnr_db`` is the bound below which nothing is written, against the torch module in float32 over ``runs``
    draws of inputs. ``uses_attention``: it is converted once for each attention kind and runs on that kind's
    compute units; else on ``default_units``.
    ``palettized``: `--nbits`, `--target-bits` and `--recipe` are about it; ``min_palettized_psnr_db`` is the bound
    by bit width, against the float16 package. ``one_size``: it is the same whatever the pictures' size.
    ``is_in``: whether a checkpoint that has its network has the component. ``build_of``: where there are several
    of the kind, gives the build of the one of that name, which takes the place of ``build``.
    """

    name: str
    build: Build
    min_psnr_db: float
    uses_attention: bool = False
    runs: int = 1
    default_units: str = "cpu-and-gpu"
    palettized: bool = False
    one_size: bool = False
    min_palettized_psnr_db: Mapping[int, float] = field(default_factory=lambda: MIN_PSNR_DB)
    is_in: Callable[[Checkpoint], bool] = lambda _: True
    build_of: Callable[[str], Build] | None = None

    @property
    def subfolder(self) -> str:
        """Where its network lies in a checkpoint in diffusers' layout."""
        return subfolder_of(self.name)

    def named(self, name: str) -> Component:
        """The one of several that is called so; the component itself where that is its name."""
        if name == self.name or self.build_of is None:
            return self
        return replace(self, name=name, build=self.build_of(name))

    def compute_units(self, attention: AttentionKind) -> str:
        """What its models of that attention kind run on, unless the user says otherwise."""
        return attention.about.compute_units if self.uses_attention else self.default_units

    def bits(self, options: ConvertOptions) -> int | None:
        """Bits of all weights that ``options`` ask for, None for 16-bit weights and where it is `mixed`."""
        own = options.nbits_for.get(self.name, options.nbits_for.get(kind_of(self.name)))
        return own if own is not None else options.nbits if self.palettized else None

    def palettizes(self, options: ConvertOptions) -> bool:
        """Whether ``options`` ask for fewer bits than 16 of any of its weights."""
        return self.mixed(options) or self.bits(options) is not None

    def mixed(self, options: ConvertOptions) -> bool:
        """Whether ``options`` give each weight bits of its own."""
        asked = options.target_bits is not None or options.recipe is not None
        return asked and self.palettized and not {self.name, kind_of(self.name)} & options.nbits_for.keys()
