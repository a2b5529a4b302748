"""Running a lowered program op by op: to watch every value, or to get some by their MIL names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from diffusion_runtime.errors import DiffusionError, InputError, PackageError
from diffusion_runtime.mil import fused, winograd
from diffusion_runtime.mil.by_rows import Rows, defer, large_scores, product, scores_in_parts
from diffusion_runtime.mil.constants import torch_dtype
from diffusion_runtime.mil.fuse_attention import PEAK
from diffusion_runtime.mil.fused import by_head
from diffusion_runtime.mil.lower import REFUSALS, check_value, refusal
from diffusion_runtime.mil.match import operation
from diffusion_runtime.mil.watch_norms import STEPS, watched

Observe = Callable[[str, str, Tensor], None]
"""Called with the MIL name of each computed value, the op that computed it, and the value. The scores of a large
attention (`by_rows.HELD_ELEMENTS`) come in parts, one call for each. An attention that is one op, or has become one
(`fuse.WATCHABLE`), shows, before its value, its scores without their scale under the name with `SCORES` after it:
what they cannot exceed where that is below `FAR`, else queries and keys with factors that they may have had, and
the scores, in parts as well. A norm that has become one (`watch_norms`) shows, before its value, how far each value
on the way to it reaches."""
ObserveRun = Callable[[int, str, str, Tensor], None]
SCORES = ".scores"
FAR = 2.0**14
"""A quarter of what float16 can hold: scores that are smaller need not be known."""


def observe(
    module: fx.GraphModule, inputs: Sequence[Tensor], watch: Observe, whole: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Run ``module`` and show each computed value to ``watch`` before it is freed. Where names of values that are
    wanted ``whole`` are given, nothing comes in parts."""
    (outputs,) = observe_all(module, [inputs], lambda _, *value: watch(*value), whole)
    return outputs


def observe_all(
    module: fx.GraphModule,
    runs: Sequence[Sequence[Tensor]],
    watch: ObserveRun | None = None,
    whole: Sequence[str] = (),
) -> list[dict[str, Tensor]]:
    """`observe` for several runs side by side, op by op: each weight is read once, and a convolution takes the rows
    of all. ``watch`` is also told which run it is; None: nothing is shown. An error names the op that fails."""
    watched = [
        _Watched(module, inputs, None if watch is None else partial(watch, run), whole)
        for run, inputs in enumerate(runs)
    ]
    watched[0].others = watched[1:]
    with torch.no_grad():
        for node in module.graph.nodes:
            for one in watched:
                one.step(node)
    return [one.env[node] for one in watched]  # the last node's values: the outputs


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

    observe(module, inputs, keep, names)
    return {name: found[name] for name in names}


def _longest(rows: Tensor) -> float:
    """The largest Euclidean norm of a row; nan where an element is."""
    return float(torch.linalg.vector_norm(rows, dim=-1).max()) if rows.numel() else 0.0


class _Watched(fx.Interpreter):
    """Checks each value against its declared type, and says which op an error comes from."""

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Tensor], watch: Observe | None, whole: Sequence[str]
    ) -> None:
        super().__init__(module)
        self.args_iter = iter(inputs)
        self.extra_traceback = False  # errors keep their one line
        self.others: Sequence[_Watched] = ()
        """The runs beside this one: what is computed for all at once it computes, and gives to them."""
        self._given: dict[fx.Node, Any] = {}
        self._watch = watch
        self._in_parts = frozenset() if whole else large_scores(module)

    def step(self, n: fx.Node) -> None:
        """Compute the value of the next node, and free what is not needed any more."""
        self.env[n] = self.run_node(n)
        for unused in self.user_to_last_uses.get(n, ()):
            del self.env[unused]

    def run_node(self, n: fx.Node) -> Any:
        where = f"{n.meta.get('op', n.op)} {n.meta.get('mil', n.name)}"
        try:
            value = self._value(n)
            if isinstance(value, Tensor) and n.op == "call_function" and "mil" in n.meta:
                dtype = value.dtype if value.is_floating_point() else torch_dtype(n.meta["type"], torch.float32)
                check_value(n.meta["type"], value, dtype)
        except DiffusionError as error:
            raise type(error)(f"{where}: {error}") from error
        except REFUSALS as error:
            raise PackageError(f"{where}: {refusal(error)}") from error
        if isinstance(value, Tensor) and "mil" in n.meta and n.op in ("call_function", "placeholder"):
            if self._watch is not None:
                self._show_scores(n, self._watch)
            self._show(n, value)
        return value

    def _show_scores(self, n: fx.Node, watch: Observe) -> None:
        if operation(n) not in ("scaled_dot_product_attention", "attend"):
            return
        _, arguments = self.fetch_args_kwargs_from_env(n)
        query, key, peak = arguments["query"], arguments["key"], float(n.meta.get(PEAK, 1.0))
        if operation(n) == "attend":
            query, key = by_head(query, key, arguments["labels"], arguments.get("heads", 1))
        # By Cauchy and Schwarz no score is larger; nor is an operand with a factor on its way to the product.
        most = peak * max(_longest(query), 1.0) * max(_longest(key), 1.0)  # in this order nan stays nan
        if most < FAR:
            parts: Iterable[Tensor] = [query.new_tensor(most)]
        else:  # and what operands may be with their factors
            parts = itertools.chain([query * peak, key * peak], scores_in_parts(query * peak, key))
        for part in parts:
            watch(n.meta["mil"] + SCORES, n.meta["op"], part)

    def _value(self, n: fx.Node) -> Any:
        if n in self._given:
            return self._given.pop(n)
        if self.others and (n.op == "call_module" or n.target in (fused.conv2d, winograd.conv2d)):
            return self._value_for_all(n)
        if STEPS in n.meta and self._watch is not None:
            value, reached = watched(n, **self.fetch_args_kwargs_from_env(n)[1])
            for step in reached:
                self._watch(*step)
            return value
        if n.op == "call_function" and self._in_parts:
            _, arguments = self.fetch_args_kwargs_from_env(n)
            if n in self._in_parts:
                return defer(n, arguments, self._show)
            if any(isinstance(value, Rows) for value in arguments.values()):
                return product(n, arguments)
        return super().run_node(n)

    def _value_for_all(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            mine = super().run_node(n)
            theirs = [mine for _ in self.others]
        else:
            arguments = [one.fetch_args_kwargs_from_env(n)[1] for one in (self, *self.others)]
            rows = [given["x"] for given in arguments]
            function: Any = n.target
            mine, *theirs = function(**{**arguments[0], "x": torch.cat(rows)}).split([len(x) for x in rows])
        for one, value in zip(self.others, theirs, strict=True):
            one._given[n] = value
        return mine

    def _show(self, n: fx.Node, value: Tensor) -> None:
        if self._watch is not None:
            self._watch(n.meta["mil"], n.meta["op"], value)
