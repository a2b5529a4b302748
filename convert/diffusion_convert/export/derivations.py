"""Which tensors other tensors are computed from, as it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Derivations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In this context, ``used`` collects the names of those ``tensors`` that anything is computed from. Views of a
    tensor (another shape, a transposition) are the tensor still."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: set[str] = set()
        self._names = {storage: name for name, tensor in tensors.items() for storage in _storages([tensor])}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage for storage in _storages(tree_leaves((args, kwargs))) if storage in self._names}
        if given and not given.issuperset(_storages(tree_leaves(result), default=0)):
            self.used.update(self._names[storage] for storage in given)
        return result


def _storages(values: Sequence[Any], default: int | None = None) -> Iterator[int]:
    """Where tensors lie in memory; ``default`` for what is no tensor."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage().data_ptr()
        elif default is not None:
            yield default
