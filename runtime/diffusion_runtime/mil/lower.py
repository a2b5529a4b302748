"""MIL -> torch.fx: one node per operation, constants as buffers; the generated code frees values after their use.

``print(module.code)`` shows the program; ``module.to(device)`` moves it. A node's ``meta["mil"]`` is the MIL name
of its value, ``meta["type"]`` its declared type, ``meta["op"]`` the op that computes it.
"""

from __future__ import annotations

import linecache
import operator
import os
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx import graph_module
from torch.fx._lazy_graph_module import _LazyGraphModule

from diffusion_runtime.errors import DiffusionError, PackageError, UnsupportedError, first_line
from diffusion_runtime.later import no_compiler
from diffusion_runtime.mil.check import CONST, budget, check_package, operands, output_name
from diffusion_runtime.mil.constants import Constant, literal, torch_dtype
from diffusion_runtime.mil.ops.registry import OPS, Kind, Op, Parameter
from diffusion_runtime.mil.package import Package
from diffusion_runtime.mil.program import (
    DType,
    Function,
    Operation,
    TensorType,
    Value,
    ValueType,
    Variable,
    operations,
)
from diffusion_runtime.mil.sizes import Sizes, like, most_at_once, on_meta

REFUSALS = (RuntimeError, ValueError, IndexError, TypeError)
"""What torch raises for operands that do not fit."""

RELEASE_EVERY = 16
"""After how many weights the pages of the file that were read are let go of."""

STREAMED_ELEMENTS = 4096
"""Constants with more elements than this stay in the file when weights are streamed."""


class Stored(torch.nn.Module):
    """A weight that stays in its file and is read and widened each time it is needed. It tells of itself what a
    tensor does: shape, dtype and device."""

    def __init__(
        self, constant: Constant, dtype: torch.dtype, device: torch.device, release: Callable[[], None]
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = _static(constant.type) or (), dtype, device
        self._constant, self.release = constant, release

    def stored(self) -> np.ndarray:
        """The weight in its own element type. ``release`` lets go of the file's pages that were read for it."""
        return self._constant.array()

    def forward(self) -> Tensor:
        value = self._constant.as_tensor(self.dtype)
        self.release()
        return value.to(self.device)


def lower(
    package: Package,
    *,
    function: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    stream_weights: bool = False,
    channels_last: bool = False,
) -> fx.GraphModule:
    """The program of ``function`` (default: the model's default) as a module: input tensors in the order of the
    function's inputs -> dict of output tensors by name.

    Float arithmetic is in ``dtype``; with one of 16 bits, what a program of mixed precision declares float32 stays
    float32, as do inputs that it widens at once (a timestep's phases need that). With ``stream_weights`` large
    weights stay in their file and are widened only while they are used. With ``channels_last`` the kernels of
    two-dimensional convolutions lie so in memory. ``module.meta`` holds every constant by MIL name ("constants")
    and the inputs' element types ("input_dtypes"). Raises PackageError or UnsupportedError, with all that is
    missing, before any weight is read.
    """
    check_package(package)
    name = function or package.model.default_function or "main"
    if name not in package.model.program.functions:
        known = ", ".join(package.model.program.functions)
        raise PackageError(f"{package.path}: no function {name!r}; it has {known}")
    lowering = _Lowering(
        package, package.model.program.functions[name], dtype, torch.device(device), stream_weights, channels_last
    )
    # What operations make of meta tensors is asked of torch's reference functions, which would import its compiler.
    with torch.no_grad(), no_compiler():
        return lowering.run()


_GENERATING = threading.RLock()


class Lowered(_LazyGraphModule):
    """A lowered program. Its Python code is generated when it is first called, or asked for: rewrites and runs op
    by op need none."""

    def real_recompile(self) -> None:
        with _GENERATING:  # it changes nodes while it reads them, and two threads may be the first to call
            super().real_recompile()

    def _real_recompile(self) -> Any:
        made = super()._real_recompile()
        # For tracebacks torch.fx and linecache keep the text of every function that was ever generated, and have no
        # call to give it up. Where models are loaded anew for each picture, this adds up to 0.5 MB a picture.
        weakref.finalize(self, _forget, type(self).forward.__code__.co_filename).atexit = False
        return made


def _forget(name: str) -> None:
    graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


@dataclass
class _Lowering:
    package: Package
    function: Function
    dtype: torch.dtype
    device: torch.device
    stream: bool
    channels_last: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: torch.nn.Module = field(default_factory=torch.nn.Module)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    buffers: dict[str, Constant] = field(default_factory=dict)
    made: dict[fx.Node, Sequence[Tensor]] = field(default_factory=dict)
    """What nodes compute, as meta tensors."""
    mixed: bool = field(init=False)
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        """A program with float16 values is of mixed precision; one without is narrowed as a whole."""
        kinds = [variable.type for op in operations(self.function.block) for variable in op.outputs]
        self.mixed = any(isinstance(kind, TensorType) and kind.dtype is DType.FLOAT16 for kind in kinds)
        self.sizes = Sizes(budget(self.package))

    def run(self) -> fx.GraphModule:
        widened = _widened_at_once(self.function) if self.dtype != torch.float32 else frozenset()
        dtypes = []
        for variable in self.function.inputs:
            self._name(self.graph.placeholder(_identifier(variable.name)), variable, "input")
            kept = torch_dtype(variable.type, torch.float32)
            dtypes.append(kept if variable.name in widened else self._dtype(variable.type))
        for operation in self.function.block.operations:
            try:
                self._operation(operation)
            except DiffusionError as error:
                raise type(error)(
                    f"{self.package.path}: {operation.type} {output_name(operation)}: {error}"
                ) from error
        self.graph.output({name: self._tensor(name, name) for name in self.function.block.outputs})
        self.sizes.check(most_at_once(self.graph, self.made), f"{self.package.path}: the whole program ")
        self._fill_buffers()
        module = Lowered(self.root, self.graph, "Lowered")
        module.meta.update(constants=self.constants, input_dtypes=tuple(dtypes))
        return module.eval()

    def _operation(self, operation: Operation) -> None:
        if operation.type == CONST:
            self.constants[operation.outputs[0].name] = literal(operation.attributes["val"], self.package.array)
            return
        op = OPS[operation.type]
        given = operands(operation)
        if op.packed:
            self._packed(op, given, operation)
            return
        # Shapes that a program computes from constants must be known before it runs, for fusions to fit.
        known = all(isinstance(b, Value) or b in self.constants for bindings in given.values() for b in bindings)
        if known and self._is_small(operation):
            self._fold(op, given, operation)
        else:
            self._emit(op, given, operation)

    # Compressed weights: a promise of the dense array.

    def _packed(self, op: Op, given: Mapping[str, Sequence[str | Value]], operation: Operation) -> None:
        arguments = {name: self._constant(bindings[0]) for name, bindings in given.items()}

        def load(index: int) -> Any:
            values = {
                name: constant.array() if op.parameters[name].kind is Kind.ARRAY else constant.python()
                for name, constant in arguments.items()
            }
            made = _apply(op, values)
            return made[index] if op.several else made

        for index, variable in enumerate(operation.outputs):
            self.constants[variable.name] = Constant(variable.type, partial(load, index))

    # What follows of constants alone is computed now.

    def _is_small(self, operation: Operation) -> bool:
        return not self.stream or all(
            _elements(variable.type) <= STREAMED_ELEMENTS for variable in operation.outputs
        )

    def _fold(self, op: Op, given: Mapping[str, Sequence[str | Value]], operation: Operation) -> None:
        arguments: dict[str, Any] = {}
        for name, bindings in given.items():
            kind = op.parameters[name].kind
            constants = [self._constant(binding) for binding in bindings]
            if kind is Kind.TENSORS:
                arguments[name] = [self._dense(constant) for constant in constants]
            elif kind is Kind.TENSOR:
                arguments[name] = self._dense(constants[0])
            else:
                arguments[name] = constants[0].python()
        arguments |= self._filled_in(op, operation)
        self.sizes.keep(self.sizes.results(op, on_meta(arguments)) or self._declared(operation))
        result = _apply(op, arguments)
        for variable, value in zip(operation.outputs, result if op.several else (result,), strict=True):
            check_value(variable.type, value, self._dtype(variable.type))
            self.constants[variable.name] = Constant(variable.type, tensor=value)

    # Everything else becomes a node.

    def _emit(self, op: Op, given: Mapping[str, Sequence[str | Value]], operation: Operation) -> None:
        name = output_name(operation)
        arguments: dict[str, Any] = {
            parameter: self._argument(op.parameters[parameter], bindings, f"{name}_{parameter}")
            for parameter, bindings in given.items()
        }
        arguments |= self._filled_in(op, operation)
        made = self.sizes.results(op, fx.node.map_arg(arguments, self._like)) or self._declared(operation)
        node = self.graph.create_node("call_function", op.function, (), arguments, name=_identifier(name))
        self.made[node] = made
        if not op.several:
            self._name(node, operation.outputs[0], operation.type)
            return
        node.meta["op"] = operation.type
        for index, variable in enumerate(operation.outputs):
            item = self.graph.create_node(
                "call_function", operator.getitem, (node, index), name=_identifier(variable.name)
            )
            self._name(item, variable, operation.type)
            self.made[item] = made[index : index + 1]

    def _like(self, node: fx.Node) -> Tensor:
        """What a node computes, as a meta tensor."""
        return self.made[node][0] if node in self.made else like(node.meta["type"], self._dtype(node.meta["type"]))

    def _declared(self, operation: Operation) -> list[Tensor]:
        return [like(variable.type, self._dtype(variable.type)) for variable in operation.outputs]

    def _argument(self, parameter: Parameter, bindings: Sequence[str | Value], name: str) -> Any:
        if parameter.kind is Kind.TENSORS:
            return [self._tensor(binding, f"{name}_{index}") for index, binding in enumerate(bindings)]
        if len(bindings) != 1:
            raise UnsupportedError(f"{len(bindings)} values for {parameter.name}, expected one")
        binding = bindings[0]
        if parameter.kind is Kind.TENSOR:
            return self._tensor(binding, name)
        if isinstance(binding, Value) or binding in self.constants:
            return self._constant(binding).python()
        if parameter.kind is Kind.CONSTANT_OR_TENSOR:
            return self.nodes[binding]
        raise UnsupportedError(f"{parameter.name} is computed by the program, expected a constant")

    def _tensor(self, binding: str | Value, name: str) -> fx.Node:
        """The node of a tensor operand; a constant's is made at its first use."""
        if isinstance(binding, str):
            if binding in self.nodes:
                return self.nodes[binding]
            name = binding
        constant = self._constant(binding)
        target = _identifier(name)
        # Two MIL names can become one Python identifier.
        if hasattr(self.root, target) or target in self.buffers:
            target = f"{target}_{len(self.nodes)}_{len(self.buffers)}"
        if self.stream and constant.tensor is None and _elements(constant.type) > STREAMED_ELEMENTS:
            self.root.add_module(
                target, Stored(constant, self._float(constant.type), self.device, self.package.release)
            )
            node = self.graph.create_node("call_module", target, name=target)
        else:
            self.buffers[target] = constant
            node = self.graph.create_node("get_attr", target, name=target)
        node.meta.update(mil=name, type=constant.type, op=CONST)
        if isinstance(binding, str):
            self.nodes[binding] = node
        return node

    def _constant(self, binding: str | Value) -> Constant:
        if isinstance(binding, Value):
            return literal(binding, self.package.array)
        if binding not in self.constants:
            raise UnsupportedError(f"{binding!r} is computed by the program, expected a constant")
        return self.constants[binding]

    def _filled_in(self, op: Op, operation: Operation) -> dict[str, Any]:
        dtype = self._dtype(operation.outputs[0].type)
        return {name: dtype for name, parameter in op.parameters.items() if parameter.is_filled_in}

    def _dtype(self, kind: ValueType) -> torch.dtype:
        return torch_dtype(kind, self._float(kind))

    def _dense(self, constant: Constant) -> Tensor:
        return constant.as_tensor(self._float(constant.type))

    def _float(self, kind: ValueType) -> torch.dtype:
        """The type of float arithmetic on values of this kind."""
        declared = kind.dtype if isinstance(kind, TensorType) else None
        return torch.float32 if self.mixed and declared is not DType.FLOAT16 else self.dtype

    def _name(self, node: fx.Node, variable: Variable, op: str) -> None:
        node.meta.update(mil=variable.name, type=variable.type, op=op)
        self.nodes[variable.name] = node

    def _fill_buffers(self) -> None:
        """Read, decompress and widen the weights that nodes refer to, several at a time."""
        kernels = _kernels(self.graph) if self.channels_last else frozenset()

        def fill(item: tuple[str, Constant]) -> tuple[str, Tensor]:
            target, constant = item
            try:
                tensor = self._dense(constant)
            except DiffusionError as error:
                raise type(error)(f"{self.package.path}: {target}: {error}") from error
            if target in kernels and tensor.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            return target, tensor.to(self.device)

        # Reading, decompressing and widening run outside of Python's lock; more threads only hold more memory.
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            for count, (target, tensor) in enumerate(pool.map(fill, self.buffers.items())):
                self.root.register_buffer(target, tensor)
                if count % RELEASE_EVERY == 0:
                    self.package.release()
        self.package.release()


def _widened_at_once(function: Function) -> frozenset[str]:
    """Inputs that nothing but casts uses: one in float16 holds a timestep of 981 exactly, bfloat16 does not."""
    elsewhere = {
        binding
        for operation in operations(function.block)
        if operation.type != "cast"
        for bindings in operands(operation).values()
        for binding in bindings
        if isinstance(binding, str)
    }
    return frozenset(variable.name for variable in function.inputs) - elsewhere - set(function.block.outputs)


def _kernels(graph: fx.Graph) -> frozenset[str]:
    """Constants that are kernels of convolutions and nothing else."""
    return frozenset(
        node.target
        for node in graph.nodes
        if node.op == "get_attr"
        and isinstance(node.target, str)
        and all(user.meta.get("op") == "conv" and user.kwargs.get("weight") is node for user in node.users)
    )


def _apply(op: Op, arguments: dict[str, Any]) -> Any:
    """Call an op; what torch refuses is a fault of the program."""
    try:
        return op.function(**arguments)
    except REFUSALS as error:
        raise PackageError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """What to say of an error that torch raises for operands that do not fit."""
    return f"operands do not fit: {first_line(error)}"


def check_value(kind: ValueType, value: Tensor, dtype: torch.dtype) -> None:
    """Raise PackageError where a value is not what the program declares."""
    declared = kind.shape if isinstance(kind, TensorType) else ()
    fits = len(declared) == value.ndim and all(
        size in (None, actual) for size, actual in zip(declared, value.shape, strict=True)
    )
    if not fits or value.dtype != dtype:
        raise PackageError(
            f"gives {value.dtype} of shape {tuple(value.shape)}, but {dtype} of shape {declared} is declared"
        )


def _static(kind: ValueType) -> tuple[int, ...] | None:
    if not isinstance(kind, TensorType) or None in kind.shape:
        return None
    return tuple(size for size in kind.shape if size is not None)


def _elements(kind: ValueType) -> int:
    return int(np.prod(_static(kind) or (0,), dtype=np.int64))


def _identifier(name: str) -> str:
    """A Python name for a MIL name (MIL allows characters that Python does not)."""
    plain = re.sub(r"\W", "_", name)
    return plain if plain and not plain[0].isdigit() else f"_{plain}"
