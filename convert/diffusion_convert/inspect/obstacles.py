"""What would keep a model, or parts of it, off the Neural Engine, with the reason.

The Neural Engine computes in float16 on tensors of at most five dimensions and of known shapes. What of a model it
takes is Core ML's decision and differs between chips; these are the rules that hold on all of them. Sources: Apple,
"Deploying Transformers on the Apple Neural Engine" (2022); coremltools' guide to compute precision and flexible
shapes; published compute plans, in which table look-ups and selections stay on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from diffusion_runtime.families import preferred
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.program import DType, Function, Operation, TensorType, operations

_MAX_RANK = 5
_MAX_DIMENSION = 16_384
_PHONE_BYTES = 1_000_000_000
_CPU_ONLY = frozenset(
    {
        "gather",
        "gather_nd",
        "gather_along_axis",
        "scatter",
        "scatter_nd",
        "scatter_along_axis",
        "topk",
        "argsort",
        "non_zero",
        "one_hot",
        "non_maximum_suppression",
        "cumsum",
        "lstm",
        "gru",
        "rnn",
    }
)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """``operations`` counts by type; empty where the whole model is meant."""

    reason: str
    operations: dict[str, int]


def obstacles(model: Model, weight_bytes: int) -> tuple[Obstacle, ...]:
    """All obstacles, those of the whole model first."""
    return (*_of_model(model, weight_bytes), *_of_operations(model.function))


def _of_model(model: Model, weight_bytes: int) -> Iterator[Obstacle]:
    # Of enumerated shapes it takes each: https://developer.apple.com/forums/thread/724930
    flexible = [feature.name for feature in model.interface.inputs if feature.shape_range]
    if flexible:
        reason = f"ranges of shapes ({', '.join(flexible)}): the Neural Engine takes the default shape alone"
        yield Obstacle(reason, {})
    if weight_bytes > _PHONE_BYTES:
        size = f"{weight_bytes / 1e9:.2f} GB"
        yield Obstacle(f"{size} of weights: iPhones and iPads take about 1 GB; palettize or chunk the UNet", {})


def _of_operations(function: Function) -> Iterator[Obstacle]:
    rules: tuple[tuple[str, Callable[[Operation], bool]], ...] = (
        ("computed in float32: the Neural Engine computes in float16", _in_float32),
        ("integer arithmetic: stays on the CPU", _in_integers),
        (f"tensors of more than {_MAX_RANK} dimensions", _of_high_rank),
        (f"a dimension of more than {_MAX_DIMENSION}", _of_long_dimension),
        ("look-ups, selections and recurrences: stay on the CPU", lambda operation: operation.type in _CPU_ONLY),
        ("control flow", lambda operation: bool(operation.blocks)),
    )
    everything = [operation for operation in operations(function.block) if not _is_free(operation.type)]
    for reason, applies in rules:
        counts = _counted(operation.type for operation in everything if applies(operation))
        if counts:
            yield Obstacle(reason, counts)
    if _attends_at_once(everything):
        better = preferred("cpu-and-ne")[0].value
        reason = f"attention over all heads at once: large tensors; {better} is made for the Neural Engine"
        yield Obstacle(reason, _counted(op.type for op in everything if op.type in ("softmax", "matmul")))


def _is_free(kind: str) -> bool:
    """Constants and conversions, which no compute unit has to take."""
    return kind in ("const", "cast") or kind.startswith("constexpr_")


def _types(operation: Operation) -> Iterator[TensorType]:
    return (variable.type for variable in operation.outputs if isinstance(variable.type, TensorType))


def _in_float32(operation: Operation) -> bool:
    return any(kind.dtype in (DType.FLOAT32, DType.FLOAT64) for kind in _types(operation))


def _in_integers(operation: Operation) -> bool:
    return any(kind.dtype in (DType.INT32, DType.INT64) for kind in _types(operation))


def _of_high_rank(operation: Operation) -> bool:
    return any(len(kind.shape) > _MAX_RANK for kind in _types(operation))


def _of_long_dimension(operation: Operation) -> bool:
    return any((size or 0) > _MAX_DIMENSION for kind in _types(operation) for size in kind.shape)


def _attends_at_once(everything: list[Operation]) -> bool:
    """Several softmaxes, and products that are no einsum: attention that is not split."""
    counts = _counted(operation.type for operation in everything)
    return counts.get("softmax", 0) > 1 and "einsum" not in counts and "matmul" in counts


def _counted(types: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(types).items()))
