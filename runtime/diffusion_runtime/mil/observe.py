"""Running a lowered program op by op: to watch every value, or to get some by their MIL names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from diffusion_runtime.errors import InputError

Observe = Callable[[str, str, Tensor], None]
"""Called with the MIL name of each computed value, the op that computed it, and the value."""


def observe(module: fx.GraphModule, inputs: Sequence[Tensor], watch: Observe) -> dict[str, Tensor]:
    """Run ``module`` and show each computed value to ``watch`` before the next op runs. Values are freed."""
    with torch.no_grad():
        outputs: dict[str, Tensor] = _Watched(module, watch).run(*inputs)
    return outputs


def intermediates(module: fx.GraphModule, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The values of the given MIL names. Raises InputError for names that the program does not compute."""
    computed = {node.meta["mil"] for node in module.graph.nodes if "mil" in node.meta and node.op != "get_attr"}
    constants = module.meta["constants"]
    unknown = [name for name in names if name not in computed and name not in constants]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(computed), 3)
        raise InputError(f"no value named {', '.join(unknown)} is computed here{f'; near: {near}' if near else ''}")
    found: dict[str, Tensor] = {
        name: constants[name].as_tensor(torch.float32)
        for name in names
        if name in constants and name not in computed
    }

    def keep(name: str, _: str, value: Tensor) -> None:
        if name in names:
            found[name] = value.clone()

    observe(module, inputs, keep)
    return {name: found[name] for name in names}


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watch: Observe) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and "mil" in n.meta and n.op in ("call_function", "placeholder"):
            source = n.args[0] if n.args and isinstance(n.args[0], fx.Node) and "op" not in n.meta else n
            self._watch(n.meta["mil"], source.meta.get("op", "input"), value)
        return value
