"""How large the values of a program become, found before any is computed: torch's meta tensors have no elements.

A program of a few lines can ask for tensors that no machine has room for, and declare shapes that say otherwise. So
declarations are not taken at their word: each op is run on meta tensors, and whatever it would allocate on its way
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.ops.registry import Op
from diffusion_runtime.mil.program import TensorType, ValueType

_UNKNOWN = frozenset({"lstm", "scaled_dot_product_attention"})
"""Ops that meta tensors say nothing of: one takes a step for each element of a sequence, the other is computed
without the scores that it would need there."""


_KNOWN: dict[Any, tuple[int, Sequence[Tensor] | None]] = {}
"""What `_made` has said: a program has a few hundred different operations of thousands, as far as shapes go, and
the next program has many of the same."""
_MOST_KNOWN = 1 << 12


@dataclass
class Sizes:
    """Looks after one program. ``limit`` is how many bytes it may take, ``kept`` how many it has taken for good."""

    limit: int
    kept: int = field(default=0, init=False)

    def results(self, op: Op, arguments: Mapping[str, Any]) -> Sequence[Tensor] | None:
        """What ``op`` makes of meta tensors, as meta tensors. None where that cannot be told: because it depends on
        values, or because operands do not fit, which running it says.

        Raises UnsupportedError where it would allocate more than the program may."""
        try:
            key = (op.function, _layout(arguments))
            known = _KNOWN.get(key)
            if known is None:
                if len(_KNOWN) >= _MOST_KNOWN:
                    _KNOWN.clear()
                known = _KNOWN[key] = _made(op, arguments)
        except TypeError:  # an argument that is no key
            known = _made(op, arguments)
        largest, found = known
        self.check(largest)
        return found

    def keep(self, results: Iterable[Tensor]) -> None:
        """Count values that are computed now and stay. Raises UnsupportedError where it gets too much."""
        self.kept += sum(map(nbytes, results))
        self.check(self.kept)

    def check(self, count: int, what: str = "") -> None:
        """Raises UnsupportedError, of which ``what`` is the beginning, where ``count`` bytes are too many."""
        if count > self.limit:
            raise UnsupportedError(
                f"{what}gives {count / 1e9:.1f} GB, expected at most {self.limit / 1e9:.1f} GB for a model of this "
                "size"
            )


def _made(op: Op, arguments: Mapping[str, Any]) -> tuple[int, Sequence[Tensor] | None]:
    """The most bytes that ``op`` allocates at once, and what it makes of meta tensors; None where that cannot be
    told."""
    watch = _Allocations()
    try:
        with torch.no_grad(), torch.device("meta"), watch:
            found = None if op.name in _UNKNOWN else op.function(**arguments)
    except (RuntimeError, ValueError, IndexError, TypeError, OverflowError):
        found = None
    return watch.largest, found if found is None or op.several else (found,)


def _layout(value: Any) -> Any:
    """What meta tensors differ by, and all else that an operation is given, as a key. Raises TypeError where it is
    none."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.storage_offset(), nbytes(value)
    if isinstance(value, Mapping):
        return tuple((name, _layout(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_layout(item) for item in value)
    hash(value)
    return type(value), value


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every tensor that is made, those on the way included; a view takes nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, nbytes(value))
        return made


def like(kind: ValueType, dtype: torch.dtype) -> Tensor:
    """A meta tensor of a declared type; an unknown size counts once."""
    shape = [1 if size is None else size for size in kind.shape] if isinstance(kind, TensorType) else []
    return torch.empty(shape, dtype=dtype, device="meta")


def on_meta(arguments: dict[str, Any]) -> Any:
    """Arguments of an op with their tensors, however deep, on the meta device."""
    return fx.node.map_aggregate(arguments, lambda one: one.to("meta") if isinstance(one, Tensor) else one)


def nbytes(value: Tensor) -> int:
    """What the memory behind a tensor takes."""
    return int(value.untyped_storage().nbytes())


def most_at_once(graph: fx.Graph, made: Mapping[fx.Node, Sequence[Tensor]]) -> int:
    """The most bytes that a run of ``graph`` holds of what its nodes have ``made``: the last use frees it."""
    held = most = 0
    order = {node: number for number, node in enumerate(graph.nodes)}
    freed: dict[int, int] = {}
    for node, number in order.items():
        taken = sum(map(nbytes, made.get(node, ())))
        held += taken
        most = max(most, held)
        last = max((order[user] for user in node.users), default=number)
        freed[last] = freed.get(last, 0) + taken
        held -= freed.pop(number, 0)
    return most
