"""Split attention goes through coremltools in one piece, and is split afterwards.

``split_einsum_v2`` has three operations for each chunk of each head, 24,000 in a UNet of Stable Diffusion XL at
1024 pixels, and ``ct.convert`` takes ten milliseconds for each operation. So a network is traced with attentions of
one head and one chunk: einsum, softmax, einsum. What coremltools makes of these three, and in which precision, is
then repeated here for every head and chunk, between the splits and concats that `networks.attention` would have had
traced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from diffusion_convert.networks.attention import split_einsum, split_einsum_v2
from diffusion_convert.networks.transformer import Attention, SpatialAttention
from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.program import Block, DType, Operation, TensorType, Value, Variable

COPY = re.compile(r"(_head_\d+)?(_chunk_\d+)?$")
"""What the names of copies end with, after the name of the operation that they are copies of."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Into what an attention is to be split: ``chunk`` is the most queries at once, 0 for all."""

    heads: int
    chunk: int

    def sizes(self, queries: int) -> list[int]:
        """The queries of each chunk; the last has what is left."""
        return split_einsum_v2.chunk_sizes(queries, self.chunk or queries)


@contextmanager
def in_one_piece(network: nn.Module) -> Iterator[Mapping[str, Pieces]]:
    """In this context, split attentions of ``network`` have one head and one chunk: right in shape, wrong in value.
    Gives what each is to be split into, by the path of its module."""
    chunks = {split_einsum.attend: 0, split_einsum_v2.attend: split_einsum_v2.QUERY_CHUNK}
    found = {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, (Attention, SpatialAttention)) and module.attend in chunks
    }
    before = {path: (module.heads, module.attend) for path, module in found.items()}
    try:
        for module in found.values():
            module.heads, module.attend = 1, split_einsum.attend
        yield {path: Pieces(heads, chunks[attend]) for path, (heads, attend) in before.items()}
    finally:
        for path, module in found.items():
            module.heads, module.attend = before[path]


def split(model: Model, pieces: Mapping[str, Pieces], modules: Mapping[str, str]) -> tuple[Model, dict[str, str]]:
    """``model`` with its attentions split, and ``modules``, operations' torch modules, for the new program.

    Raises UnsupportedError where an attention does not stand in the program as it was traced."""
    if not pieces:
        return model, dict(modules)
    name, function = next((name, item) for name, item in model.program.functions.items() if item is model.function)
    attentions = {one.mixed.outputs[0].name: one for one in _attentions(function.block, pieces, modules)}
    types = {variable.name: variable for variable in function.inputs}
    operations: list[Operation] = []
    replaced = {operation.outputs[0].name for one in attentions.values() for operation in one.scored}
    module_of: dict[str, str] = {}
    for operation in function.block.operations:
        types |= {variable.name: variable for variable in operation.outputs}
        first = operation.outputs[0].name if operation.outputs else ""
        if first in replaced:
            continue
        made = [operation]
        if first in attentions:
            made = _Copies(attentions[first], types).made()
        operations += made
        module = modules.get(first, "")
        module_of |= {item.name: module for one in made if one.type != "const" for item in one.outputs}
    block = replace(function.block, operations=tuple(operations))
    functions = {
        **model.program.functions,
        name: replace(function, blocks={**function.blocks, function.opset: block}),
    }
    return replace(model, program=replace(model.program, functions=functions)), module_of


@dataclass(frozen=True, slots=True)
class _Attention:
    """``scored``: the operations from the first einsum to the one before the second, ``mixed``. Casts are among
    them where a part stays in float32."""

    scored: tuple[Operation, ...]
    mixed: Operation
    pieces: Pieces


def _attentions(block: Block, pieces: Mapping[str, Pieces], modules: Mapping[str, str]) -> list[_Attention]:
    producers = {variable.name: operation for operation in block.operations for variable in operation.outputs}
    found, einsums = [], 0
    for operation in block.operations:
        path = modules.get(operation.outputs[0].name, "") if operation.outputs else ""
        if operation.type != "einsum" or path not in pieces:
            continue
        einsums += 1
        scored = _scored(operation, producers)
        if scored:
            found.append(_Attention(scored, operation, pieces[path]))
    missing = set(pieces) - {modules[one.mixed.outputs[0].name] for one in found}
    if missing or einsums != 2 * len(found):
        named = ", ".join(sorted(missing)[:3]) or "its einsum operations are no pairs"
        raise UnsupportedError(
            f"coremltools made something else than einsum, softmax, einsum of attention: {named}"
        )
    return found


def _scored(mixed: Operation, producers: Mapping[str, Operation]) -> tuple[Operation, ...]:
    """What ``mixed`` weights its values by: einsum, softmax and casts, in order; nothing where it is another."""
    chain: list[Operation] = []
    operand = mixed.inputs["values"][1]
    while isinstance(operand, str) and operand in producers:
        chain.insert(0, producers[operand])
        if chain[0].type not in ("cast", "softmax"):
            break
        operand = chain[0].inputs["x"][0]
    kinds = [operation.type for operation in chain if operation.type != "cast"]
    return tuple(chain) if kinds == ["einsum", "softmax"] else ()


@dataclass(slots=True)
class _Copies:
    """Emits one attention's operations for every head and chunk."""

    attention: _Attention
    types: Mapping[str, Variable]
    operations: list[Operation] = field(default_factory=list)

    def made(self) -> list[Operation]:
        scored, mixed = self.attention.scored, self.attention.mixed
        scores, out = scored[0].outputs[0].name, mixed.outputs[0]
        key, query = (self._operand(scored[0], index) for index in (0, 1))
        value = self._operand(mixed, 0)
        heads, sizes = self.attention.pieces.heads, self.attention.pieces.sizes(_shape(query)[3])
        if heads == 1 and len(sizes) == 1:
            return [*scored, mixed]
        each = [_shape(query)[1] // heads] * heads
        keys = self._split(key, each, 3, f"{scores}_key", "_head")
        queries = self._split(query, each, 1, f"{scores}_query", "_head")
        values = self._split(value, each, 1, f"{out.name}_value", "_head")
        mixes = []
        for head in range(heads):
            copy = f"_head_{head}" if heads > 1 else ""
            chunks = self._split(queries[head], sizes, 3, f"{scores}_query{copy}", "_chunk")
            parts = [
                self._copy(keys[head], chunk, values[head], copy + (f"_chunk_{index}" if len(sizes) > 1 else ""))
                for index, chunk in enumerate(chunks)
            ]
            mixes.append(self._join(parts, 3, out.name + copy))
        self._join(mixes, 1, out.name)
        return self.operations

    def _operand(self, einsum: Operation, index: int) -> Variable:
        return self.types[str(einsum.inputs["values"][index])]

    def _copy(self, key: Variable, query: Variable, value: Variable, copy: str) -> Variable:
        """The attention of one head and one chunk."""
        queries = _shape(query)[3]
        taken: tuple[Variable, ...] = (key, query)
        for operation in self.attention.scored:
            was = operation.outputs[0]
            variable = _like(was, (*_shape(was)[:3], queries), was.name + copy)
            inputs = dict(operation.inputs)
            inputs["values" if operation.type == "einsum" else "x"] = tuple(item.name for item in taken)
            self._add(replace(operation, inputs=inputs), variable)
            taken = (variable,)
        mixed = self.attention.mixed
        variable = _like(mixed.outputs[0], (*_shape(value)[:3], queries), f"{mixed.outputs[0].name}{copy}")
        self._add(replace(mixed, inputs={**mixed.inputs, "values": (value.name, taken[0].name)}), variable)
        return variable

    def _split(self, x: Variable, sizes: Sequence[int], axis: int, name: str, part: str) -> list[Variable]:
        if len(sizes) == 1:
            return [x]
        shape = _shape(x)
        parts = [
            _like(x, (*shape[:axis], size, *shape[axis + 1 :]), f"{name}{part}_{index}")
            for index, size in enumerate(sizes)
        ]
        inputs = {
            "axis": (self._constant(f"{name}_axis", np.int32(axis)),),
            "split_sizes": (self._constant(f"{name}_sizes", np.array(sizes, np.int32)),),
            "x": (x.name,),
        }
        self._add(Operation("split", inputs, ()), *parts, name=name)
        return parts

    def _join(self, parts: Sequence[Variable], axis: int, name: str) -> Variable:
        if len(parts) == 1:
            return parts[0]
        shape = _shape(parts[0])
        joined = _like(
            parts[0], (*shape[:axis], sum(_shape(part)[axis] for part in parts), *shape[axis + 1 :]), name
        )
        inputs = {
            "axis": (self._constant(f"{name}_axis", np.int32(axis)),),
            "interleave": (self._constant(f"{name}_interleave", np.bool_(False)),),
            "values": tuple(part.name for part in parts),
        }
        self._add(Operation("concat", inputs, ()), joined)
        return joined

    def _constant(self, name: str, data: np.generic | np.ndarray) -> str:
        array = np.asarray(data)
        kind = TensorType(DType.BOOL if array.dtype == np.bool_ else DType.INT32, array.shape)
        attributes = {"name": _text(name), "val": Value(kind, array)}
        self.operations.append(Operation("const", {}, (Variable(name, kind),), attributes))
        return name

    def _add(self, operation: Operation, *outputs: Variable, name: str = "") -> None:
        attributes = {**operation.attributes, "name": _text(name or outputs[0].name)}
        self.operations.append(replace(operation, outputs=outputs, attributes=attributes))


def _text(text: str) -> Value:
    return Value(TensorType(DType.STRING), text)


def _shape(variable: Variable) -> tuple[int, ...]:
    if not isinstance(variable.type, TensorType) or len(variable.type.shape) != 4 or None in variable.type.shape:
        raise UnsupportedError(f"{variable.name} of an attention is not of four known sizes, but {variable.type}")
    return tuple(size or 0 for size in variable.type.shape)


def _like(variable: Variable, shape: tuple[int, ...], name: str) -> Variable:
    """A variable of that shape and name, of the type of ``variable``."""
    dtype = variable.type.dtype if isinstance(variable.type, TensorType) else DType.FLOAT32
    return Variable(name, TensorType(dtype, shape))
