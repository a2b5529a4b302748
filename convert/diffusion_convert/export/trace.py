"""Tracing a network by its shapes: no value of the forward pass is computed and no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffusion_convert.components.component import Graph

_MAX_COMPUTED = 4096
"""Operations on tensors of at most this many elements are computed: a network may look at a mask or an index."""


def trace(graph: Graph) -> torch.jit.ScriptModule:
    """``graph.module`` as TorchScript. Takes seconds for a full-size UNet, where computing would take minutes."""
    examples = tuple(torch.zeros(()).expand(port.shape) for port in graph.inputs)
    with torch.no_grad(), _shapes_only(), _nothing_compiled():
        traced: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
            graph.module, examples, check_trace=False, strict=False
        )
    return traced


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """In this context, torch does not look through all that a module and its class have for methods and properties
    to compile, half of the time of a trace: it does so for a copy of each module that has none."""
    with (
        mock.patch.object(torch.jit._recursive, "dir", lambda _: (), create=True),
        mock.patch.object(torch.jit._recursive, "get_property_stubs", lambda _: []),
        mock.patch.object(torch._jit_internal, "module_has_exports", lambda _: False),
    ):
        yield


@contextmanager
def _shapes_only() -> Iterator[None]:
    """In this context, large results are zeros of one stored element.

    It lies below the tracer, which records the operations as always. What is done here, it must not record, down to
    the sizes that torch's own shape functions read: there is no tracer meanwhile.
    """
    with _ShapesOnly(), _RecordedConvolution():
        yield


class _ShapesOnly(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # How torch dispatches where nothing is traced: below the tracer, it refuses to change what is.
        self.untraced = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tracer: Any = torch._C  # its stubs lack half of it
        tracing = tracer._get_tracing_state()
        with torch._C._ForceDispatchKeyGuard(*self.untraced):
            tracer._set_tracing_state(None)
            try:
                return _run(func, args, kwargs or {})
            finally:
                tracer._set_tracing_state(tracing)


class _RecordedConvolution(TorchFunctionMode):
    """The tracer does not record a convolution but what it calls, which `_ShapesOnly` is above of."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = _convolve if func is torch.conv2d else func
        return call(*args, **(kwargs or {}))


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(views):
        if func._schema.is_mutable and _is_zeros(args[0]):
            # What is written to one stored element would be of all; an operation gives what it wrote to.
            return args[0]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        small = all(tensor.numel() <= _MAX_COMPUTED for tensor in tensors)
        if small or func._schema.is_mutable:
            return func(*args, **kwargs)
        return tree_map(_as_zeros, func(*tree_map(_as_meta, args), **tree_map(_as_meta, kwargs)))


def _as_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _as_zeros(value: Any) -> Any:
    return torch.zeros((), dtype=value.dtype).expand(value.shape) if isinstance(value, torch.Tensor) else value


def _is_zeros(value: Any) -> bool:
    """Whether a value is one of the results that only have a shape."""
    return isinstance(value, torch.Tensor) and value.numel() > 1 and not any(value.stride())


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``torch.conv2d`` by the operation that the tracer records for it."""
    strides, padded, dilated = (
        [size, size] if isinstance(size, int) else list(size) for size in (stride, padding, dilation)
    )
    flags = {"benchmark": False, "deterministic": False, "cudnn_enabled": False, "allow_tf32": False}
    result: torch.Tensor = torch._convolution(
        x, weight, bias, strides, padded, dilated, False, [0, 0], groups, **flags
    )
    return result
