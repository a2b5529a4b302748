"""One package -> two of about equal weight that run one after the other: iOS holds no whole UNet in memory at once.

The program is cut between two operations. Values that are made before the cut and used after it become outputs of
the first package and, by the same names, inputs of the second, which also takes the original inputs that it still
needs. They are declared float32, as all outputs are that existing apps know: a value that is float16 in the program
goes through float32 unchanged. Constants, packed ones too, travel with what uses them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusion_runtime.atomic import work
from diffusion_runtime.errors import InputError, UnsupportedError
from diffusion_runtime.mil.description import serialize
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import Package, open_package, write_package
from diffusion_runtime.mil.packing import packed_size
from diffusion_runtime.mil.program import (
    Blob,
    Block,
    DType,
    Feature,
    Function,
    FunctionInterface,
    Operation,
    TensorType,
    Value,
    Variable,
    numpy_dtype,
    operations,
    packed_bits,
)
from diffusion_runtime.mil.rewrite import rewrite, stored_in
from diffusion_runtime.mil.weights import ALIGNMENT, WeightWriter

MAX_IMBALANCE = 0.1
"""By how much the heavier half may outweigh the lighter one, as a part of the lighter one."""

_CARRIED = "A value that the first half hands to the second"
_DECLARED = {DType.FLOAT16: "Float32", DType.FLOAT32: "Float32", DType.INT32: "Int32"}


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that goes from one half to the other; ``name`` is the program's."""

    name: str
    type: TensorType
    shape: tuple[int, ...]

    @property
    def inner(self) -> Variable:
        return Variable(self.name, self.type)

    @property
    def declared(self) -> Variable:
        """The output and input that carry it: float16 goes as float32, under a name of its own."""
        if self.type.dtype is not DType.FLOAT16:
            return self.inner
        return Variable(f"{self.name}_fp32", TensorType(DType.FLOAT32, self.type.shape))

    @property
    def feature(self) -> Feature:
        return Feature(
            self.declared.name, "multiArray", _DECLARED[self.type.dtype], self.shape, description=_CARRIED
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """The first ``position`` operations that are no constants make the first half; ``crossing`` is what the second
    takes from it. The sizes are of the stored weights that each half needs."""

    position: int
    crossing: tuple[Crossing, ...]
    first_bytes: int
    second_bytes: int

    @property
    def imbalance(self) -> float:
        return abs(self.first_bytes - self.second_bytes) / min(self.first_bytes, self.second_bytes)

    @property
    def crossing_elements(self) -> int:
        return sum(math.prod(value.shape) for value in self.crossing)


def chunk(source: Path, first: Path, second: Path) -> Cut:
    """Write the halves of ``source``, an .mlpackage, to ``first`` and ``second``; both appear, or neither does.

    Weights are streamed: one at a time is held. Raises InputError for anything but an .mlpackage, UnsupportedError
    where the program can be cut nowhere, PackageError where it is damaged.
    """
    package = open_package(source)
    if not (source / "Manifest.json").is_file():
        raise InputError(f"{source}: only an .mlpackage can be cut in two; give the one that this was made from")
    cut = find_cut(package)
    try:
        for path, model in zip((first, second), halves(package, cut), strict=True):
            _write(package, model, path)
    except BaseException:
        shutil.rmtree(first, ignore_errors=True)
        raise
    return cut


def find_cut(package: Package) -> Cut:
    """Of the cuts whose halves are within `MAX_IMBALANCE`, the one with the fewest and smallest crossing values;
    the most even cut where none is."""
    cuts = list(_Steps(_function(package)).cuts())
    if not cuts:
        raise UnsupportedError(f"{package.path}: the program cannot be cut: no place leaves weights on both sides")
    even = [cut for cut in cuts if cut.imbalance <= MAX_IMBALANCE]
    if not even:
        return min(cuts, key=lambda cut: cut.imbalance)
    return min(even, key=lambda cut: (len(cut.crossing), cut.crossing_elements, cut.imbalance))


def halves(package: Package, cut: Cut) -> tuple[Model, Model]:
    """The two models; their constants still lie in ``package``'s weight file."""
    function, interface = _function(package), package.model.interface
    steps = _Steps(function)
    before, after = steps.operations[: cut.position], steps.operations[cut.position :]
    carried = tuple(value.declared for value in cut.crossing)
    features = tuple(value.feature for value in cut.crossing)
    # Before iOS 16 a model cannot declare float16 outside, and apps hand float32 from half to half in any case.
    narrow = [value for value in cut.crossing if value.declared != value.inner]
    outgoing = [_cast(value.inner, value.declared, DType.FLOAT32) for value in narrow]
    incoming = [_cast(value.declared, value.inner, DType.FLOAT16) for value in narrow]
    early, late = _used(before), _used(after) | set(function.block.outputs)
    first = _half(
        package.model,
        FunctionInterface(interface.name, tuple(item for item in interface.inputs if item.name in early), features),
        tuple(item for item in function.inputs if item.name in early),
        Block((*steps.with_constants(before), *outgoing), tuple(item.name for item in carried)),
        "first",
    )
    second = _half(
        package.model,
        FunctionInterface(
            interface.name,
            (*(item for item in interface.inputs if item.name in late), *features),
            interface.outputs,
        ),
        (*(item for item in function.inputs if item.name in late), *carried),
        Block((*incoming, *steps.with_constants(after)), function.block.outputs),
        "second",
    )
    return first, second


class _Steps:
    """A function's operations without its constants, and which constants they need."""

    def __init__(self, function: Function) -> None:
        block = function.block
        self.outputs = set(block.outputs)
        self.operations = [operation for operation in block.operations if not _is_constant(operation)]
        self.constants = [operation for operation in block.operations if _is_constant(operation)]

    def with_constants(self, steps: Sequence[Operation]) -> list[Operation]:
        """``steps`` after the constants that they use, directly or through other constants."""
        needed = _used(steps)
        taken = []
        # Backwards, as constants are made of constants before them: what needs one is seen before it.
        for operation in reversed(self.constants):
            if any(output.name in needed for output in operation.outputs):
                taken.append(operation)
                needed |= _used([operation])
        return [*reversed(taken), *steps]

    def cuts(self) -> Iterator[Cut]:
        """All places where the program can be cut."""
        last_use, first_use = self._uses()
        made = {output.name: index for index, step in enumerate(self.operations) for output in step.outputs}
        end = min((made[name] for name in self.outputs if name in made), default=0)
        first_bytes, second_bytes = self._bytes(first_use, last_use)
        live: dict[str, Variable] = {}
        for position in range(1, end + 1):
            live |= {output.name: output for output in self.operations[position - 1].outputs}
            live = {name: output for name, output in live.items() if last_use.get(name, -1) >= position}
            crossing = [_crossing(output) for output in live.values()]
            whole = tuple(value for value in crossing if value is not None)
            sizes = int(first_bytes[position]), int(second_bytes[position])
            if crossing and len(whole) == len(crossing) and min(sizes) > 0:
                yield Cut(position, whole, *sizes)

    def _uses(self) -> tuple[dict[str, int], dict[str, int]]:
        """The last and the first step that uses each value, a constant's users being those of what it goes into."""
        last: dict[str, int] = {}
        first: dict[str, int] = {}
        for index, step in enumerate(self.operations):
            for name in _used([step]):
                last[name] = index
                first.setdefault(name, index)
        # Backwards: a palette's own constants come before what they go into, and are needed where that is.
        for operation in reversed(self.constants):
            users = [output.name for output in operation.outputs if output.name in last]
            for name in _used([operation]) if users else ():
                last[name] = max(last.get(name, -1), *(last[user] for user in users))
                first[name] = min(first.get(name, len(self.operations)), *(first[user] for user in users))
        return last, first

    def _bytes(self, first_use: Mapping[str, int], last_use: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that the steps before each position need, and those from it on."""
        begins, ends = np.zeros(len(self.operations) + 1, np.int64), np.zeros(len(self.operations) + 1, np.int64)
        for operation in self.constants:
            used = [output.name for output in operation.outputs if output.name in last_use]
            for name in used[:1]:
                size = _stored_bytes(operation)
                begins[first_use[name] + 1] += size
                ends[last_use[name] + 1] += size
        return np.cumsum(begins), ends.sum() - np.cumsum(ends)


def _function(package: Package) -> Function:
    functions = package.model.program.functions
    if len(functions) != 1:
        raise UnsupportedError(f"{package.path}: a model of {len(functions)} functions cannot be cut in two")
    return next(iter(functions.values()))


def _is_constant(operation: Operation) -> bool:
    return operation.type == "const" or operation.type.startswith("constexpr_")


def _used(steps: Sequence[Operation]) -> set[str]:
    """The names that operations and those in their blocks read."""
    block = Block(tuple(steps), ())
    names = {
        binding
        for operation in operations(block)
        for bindings in operation.inputs.values()
        for binding in bindings
        if isinstance(binding, str)
    }
    return names | {
        name for operation in operations(block) for nested in operation.blocks for name in nested.outputs
    }


def _crossing(variable: Variable) -> Crossing | None:
    """None for what no model can declare as an output: booleans, scalars, lists, sizes that are not known."""
    kind = variable.type
    if not isinstance(kind, TensorType) or kind.dtype not in _DECLARED or not kind.shape:
        return None
    shape = tuple(size for size in kind.shape if size is not None)
    return Crossing(variable.name, kind, shape) if len(shape) == len(kind.shape) else None


def _stored_bytes(operation: Operation) -> int:
    """Bytes that a constant's values take in a weight file, their records included."""
    kinds = [value.type for _, value in operation.values if isinstance(value.data, Blob)]
    return sum(ALIGNMENT * (1 + -(-_size(kind) // ALIGNMENT)) for kind in kinds if isinstance(kind, TensorType))


def _size(kind: TensorType) -> int:
    count = math.prod(size or 1 for size in kind.shape)
    bits = packed_bits(kind.dtype)
    return packed_size(count, bits) if bits else count * numpy_dtype(kind.dtype).itemsize


def _half(
    model: Model, interface: FunctionInterface, inputs: tuple[Variable, ...], block: Block, which: str
) -> Model:
    """``model`` with another function, and a description that says which half it is."""
    program = model.program
    (name, function), *_ = program.functions.items()
    block = replace(block, attributes=function.block.attributes)
    function = replace(function, inputs=inputs, blocks={function.opset: block})
    text = f"{model.metadata.description} The {which} of two halves, which run one after the other.".strip()
    described = serialize((interface,), replace(model.metadata, description=text), model.default_function)
    return replace(model, program=replace(program, functions={name: function}), description=described)


def _cast(source: Variable, target: Variable, dtype: DType) -> Operation:
    name = Value(TensorType(DType.STRING), f"{target.name}_cast")
    to = Value(TensorType(DType.STRING), dtype.value)
    return Operation("cast", {"dtype": (to,), "x": (source.name,)}, (target,), {"name": name})


def _write(package: Package, model: Model, path: Path) -> None:
    """Write one half with a weight file of its own: each stored value once, in the program's order."""
    with work(path.parent) as slot:
        unfinished = slot / "weight.bin"
        with WeightWriter(unfinished) as writer:
            program = rewrite(model.program, stored_in(writer, package))
        write_package(replace(model, program=program), path, unfinished if writer.count else None)
