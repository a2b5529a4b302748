"""What a file holds, and weights that are computed of it, each when it is read: none of them is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

FLOAT16_MAX = 65504.0


def least_float16(tensor: torch.Tensor) -> torch.dtype:
    """Of what is computed of a tensor: its own type, but float16 where that would round coarser than models do."""
    return tensor.dtype if tensor.dtype in (torch.float16, torch.float32, torch.float64) else torch.float16


class Computed(Mapping[str, torch.Tensor]):
    """``tensors``, of which some are what a function makes of them at each access."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        functions: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        self._tensors, self._functions = tensors, functions

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._tensors[name]
        return self._functions[name](value) if name in self._functions else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """``tensors`` are views of the mapped file. ``scalars`` are the numbers and texts next to them
    (``global_step``, ``modelspec.prediction_type``). ``packed``: what decodes those that are only stood for."""

    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, int | float | str] = field(default_factory=dict)
    packed: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def decoded(self, mapped: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """``mapped``, this file's tensors under other names, each decoded when it is read."""
        if not self.packed:
            return mapped
        decoders = {id(self.tensors[name]): decode for name, decode in self.packed.items()}
        places = {name: decoders[id(value)] for name, value in mapped.items() if id(value) in decoders}
        return Computed(mapped, {name: partial(_called, decode) for name, decode in places.items()})


def _called(decode: Callable[[], torch.Tensor], _stand_in: torch.Tensor) -> torch.Tensor:
    return decode()
