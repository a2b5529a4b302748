"""Whether a package computes what its checkpoint's own network computes.

The network is diffusers' or transformers' own, on the checkpoint's weights, in float32; the package is run by the
torch backend in float32, on the same seeded inputs (the same float16 numbers). What is left is what conversion did:
other operations, weights rounded to float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def widened(network: torch.nn.Module) -> Iterator[None]:
    """In this context, ``network`` computes in float32 whatever its tensors are stored as.

    A module's own parameters and buffers are widened as it is called and dropped after, so a network whose weights
    are mapped from a file never lies in memory as a whole.
    """
    import torch

    stored: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        stored[module] = {}
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
                    stored[module][name] = tensor
                    wide = tensor.detach().float()
                    tensors[name] = wide if tensors is module._buffers else torch.nn.Parameter(wide, False)  # type: ignore[assignment]

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for name, tensor in stored.pop(module, {}).items():
            (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # type: ignore[assignment]

    handles = []
    for module in network.modules():
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
