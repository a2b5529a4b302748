"""Weights that are computed from what a file stores, each when it is read: none of them is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Computed(Mapping[str, "torch.Tensor"]):
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
