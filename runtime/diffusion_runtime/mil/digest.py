"""What a lowered program computes, as a digest.

Two programs with the same digest do the same operations on the same constants, whatever their values are called:
the same rewrites and the same runs follow, bit for bit. A value's digest is of the operation that computes it, of
all that this is told, and of the digests of what it takes, down to the inputs and to the constants' own bytes; the
program's is of all of these, its outputs' too, and of how often each value is computed and used.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from diffusion_runtime.mil.fuse_attention import PEAK
from diffusion_runtime.mil.lower import Stored
from diffusion_runtime.mil.observe import SCORES
from diffusion_runtime.mil.watch_norms import STEPS

_THREADS = 2
"""That read and hash constants, outside of Python's lock; each has one in memory."""
_CONSTANT = ("get_attr", "call_module")
_OPTIONS = (bool, int, float, str, torch.dtype)


@dataclass(frozen=True, slots=True)
class Digests:
    """``program`` is the program's; ``values`` has that of each value which `observe` can show, by the name that it
    is shown under, ``constants`` that of each constant, by its MIL name."""

    program: str
    values: Mapping[str, str]
    constants: Mapping[str, str]


def digests_of(module: fx.GraphModule) -> Digests:
    """Of a lowered program, which may have been rewritten. To be the same as another it has to be rewritten alike
    (`fuse.PLAIN`)."""
    constants = _constants(module)
    digests: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        digests[node] = constants[str(node.target)] if node.op in _CONSTANT else _digest(node, digests)
    uses = sorted((digest, len(node.users)) for node, digest in digests.items())
    values = {name: digest for node in digests for name, digest in _shown(node, digests[node])}
    named = {node.meta["mil"]: digests[node] for node in digests if node.op in _CONSTANT and "mil" in node.meta}
    return Digests(_hashed(repr(uses)), values, named)


def _shown(node: fx.Node, digest: str) -> Iterator[tuple[str, str]]:
    if "mil" in node.meta and node.op in ("call_function", "placeholder"):
        yield node.meta["mil"], digest
        yield node.meta["mil"] + SCORES, digest + SCORES
    if STEPS in node.meta:
        yield from ((name, f"{digest}.{step}") for step, name in asdict(node.meta[STEPS]).items())


def _digest(node: fx.Node, known: Mapping[fx.Node, str]) -> str:
    """Of anything but a constant. What values are declared as belongs to it: a run checks that. So does the name of
    the MIL operation: several share one Python function's name."""
    function = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
    what = node.meta.get("mil") if node.op == "placeholder" else function
    told = [node.op, what, *(repr(node.meta.get(kind)) for kind in ("op", "type", PEAK))]
    return _hashed("|".join([*map(str, told), _text(node.args, known), _text(node.kwargs, known)]))


def _text(value: Any, known: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{known[value]}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_text(one, known) for one in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name!r}:{_text(one, known)}' for name, one in sorted(value.items()))}}}"
    if value is None or isinstance(value, _OPTIONS):
        return f"{type(value).__name__} {value!r}"
    return uuid.uuid4().hex  # what is not known here is like nothing else


def _constants(module: fx.GraphModule) -> dict[str, str]:
    """The digests of all constants, by their place in the module."""
    places = [str(node.target) for node in module.graph.nodes if node.op in _CONSTANT]
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(places, pool.map(lambda place: _content(getattr(module, place)), places), strict=True))


def _content(value: Tensor | Stored) -> str:
    array = value.stored() if isinstance(value, Stored) else value.cpu().numpy()
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    digest = _hashed(f"{value.dtype} {array.dtype} {array.shape}", data)
    if isinstance(value, Stored):
        value.release()
    return digest


def _hashed(text: str, data: bytes | memoryview = b"") -> str:
    found = hashlib.sha256(text.encode())
    found.update(b"\0")
    found.update(data)
    return found.hexdigest()
