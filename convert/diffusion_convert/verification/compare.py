"""Whether a package computes what its checkpoint's own network computes, and whether float16 has room for it.

The network is diffusers' or transformers' own, on the checkpoint's weights, in float32; the package is run by the
torch backend in float32, on the same seeded inputs (the same float16 numbers). What is left is what conversion did:
other operations, weights rounded to float16.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.tensor_file import expect, let_go
from diffusion_convert.components.component import Component, Graph, Shape
from diffusion_convert.export.placeholders import FLOAT16_MAX
from diffusion_convert.verification.known_runs import Arrays, KnownRuns, Run
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.memory import release
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import DType, TensorType, operations

if TYPE_CHECKING:
    import torch

    from diffusion_runtime.mil.fuse import Pass

OnFraction = Callable[[float], None]

MOVES = frozenset(
    ("concat", "expand_dims", "identity", "reshape", "slice_by_index", "split", "squeeze", "stack", "transpose")
)
"""Operations whose results are elements of their operands: what those may be, they may be."""
NEAR_LIMIT = FLOAT16_MAX / 2
"""Where float16 is given up at `Precision.AUTO`: other prompts and latents than the seeded ones may give more."""
PIXELS_TOGETHER = 2**20
"""Of pictures of all rows in a batch of the reference's: 4 of 512x512. SDXL's at 1024x1024 would pass 8 GB."""
BEST_PSNR_DB = 200.0
"""What is reported for outputs that are equal, bit for bit."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the checkpoint's own network computes: inputs and outputs of each run."""

    inputs: tuple[Arrays, ...]
    outputs: tuple[Arrays, ...]

    def save(self, path: Path) -> None:
        arrays = {
            f"{kind}/{run}/{name}": array
            for kind, runs in (("inputs", self.inputs), ("outputs", self.outputs))
            for run, named in enumerate(runs)
            for name, array in named.items()
        }
        with unfinished_file(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Expected:
        runs: dict[str, list[dict[str, np.ndarray]]] = {"inputs": [], "outputs": []}
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            for key in file.files:
                kind, run, name = key.split("/", 2)
                if int(run) == len(runs[kind]):
                    runs[kind].append({})
                runs[kind][int(run)][name] = file[key]
        return cls(tuple(runs["inputs"]), tuple(runs["outputs"]))


@dataclass(frozen=True, slots=True)
class Verdict:
    """``psnr_db`` by output, the worst over all runs: the largest magnitude of the reference over the root mean
    squared difference. ``largest`` is the largest magnitude of each MIL value over all runs, without what is only
    moved (`MOVES`). ``outputs`` are those of each run."""

    psnr_db: Mapping[str, float]
    largest: Mapping[str, float]
    outputs: tuple[Arrays, ...]


def draw(component: Component, checkpoint: Checkpoint, shape: Shape) -> tuple[Arrays, ...]:
    """The inputs of `reference`'s runs."""
    graph = component.build(checkpoint, None, shape)
    return tuple(graph.sample(seed) for seed in range(component.runs))


def reference(component: Component, checkpoint: Checkpoint, shape: Shape, progress: OnFraction) -> Expected:
    """Run the checkpoint's own network. Its weights are widened to float32 one module at a time, once for all runs
    where those can be rows of one batch."""
    graph, inputs, together = _network(component, checkpoint, shape)
    outputs: list[Arrays] = []
    if together:
        found = _outputs(graph, {name: np.concatenate([arrays[name] for arrays in inputs]) for name in inputs[0]})
        parts = {name: np.split(array, component.runs) for name, array in found.items()}
        outputs += [{name: part[run] for name, part in parts.items()} for run in range(component.runs)]
        progress(1.0)
    else:
        for arrays in inputs:
            outputs.append(_outputs(graph, arrays))
            progress(len(outputs) / component.runs)
    release()
    for name, array in (item for run in outputs for item in run.items()):
        if not np.isfinite(array).all():
            raise VerificationError(
                f"{checkpoint.name}: its own {component.name} computes infinite or undefined values in {name}: "
                "the checkpoint is damaged"
            )
    return Expected(inputs, tuple(outputs))


def _network(component: Component, checkpoint: Checkpoint, shape: Shape) -> tuple[Graph, tuple[Arrays, ...], bool]:
    """The network, the runs' inputs, and whether it takes all of them as one batch: where there are several, and
    all that it takes and gives is by rows. One is mapped at a time, inputs are drawn before: limits of memory count
    the whole of each."""
    graph = component.build(checkpoint, None, shape)
    if component.runs == 1:
        return graph, (graph.sample(0),), False
    wanted = [(component.runs * port.shape[0], *port.shape[1:]) for port in (*graph.inputs, *graph.outputs)]
    sample = graph.sample
    del graph
    gc.collect()  # networks are cycles
    inputs = tuple(sample(seed) for seed in range(component.runs))
    gc.collect()  # those that a UNet's inputs were made with
    batch = component.runs * shape.batch_size
    if batch * shape.height * shape.width <= PIXELS_TOGETHER:
        graph = component.build(checkpoint, None, replace(shape, batch_size=batch))
        if [port.shape for port in (*graph.inputs, *graph.outputs)] == wanted:
            return graph, inputs, True
        del graph
        gc.collect()
    return component.build(checkpoint, None, shape), inputs, False


def _outputs(graph: Graph, arrays: Arrays) -> Arrays:
    """What the network of ``graph`` computes in float32."""
    import torch

    with torch_networks.silent(), widened(graph.module), torch.inference_mode():
        found = graph.module(*(torch.from_numpy(arrays[port.name]).float() for port in graph.inputs))
    tensors = found if isinstance(found, tuple) else (found,)
    return {port.name: tensor.numpy() for port, tensor in zip(graph.outputs, tensors, strict=True)}


def measure(path: Path, expected: Expected, progress: OnFraction, known: KnownRuns | None = None) -> Verdict:
    """Run the package at ``path`` on the reference's inputs and watch every value; not where a package with the
    same program is among those ``known``."""
    from diffusion_runtime.mil.fuse import WATCHABLE
    from diffusion_runtime.mil.observe import FAR, SCORES

    def run() -> Run:
        made = _measure(path, expected, progress, WATCHABLE)
        return made.outputs, made.largest

    if known is None:
        verdict = _measure(path, expected, progress, WATCHABLE)
    else:
        outputs, largest = known.once(path, expected.inputs, run, watched=True)
        progress(1.0)
        verdict = Verdict(_worst(expected, outputs), largest, tuple(outputs))
    large = [name for name, size in verdict.largest.items() if name.endswith(SCORES) and not size < FAR]
    if large:  # attention in one piece has shown that scores are, but not which operations' values
        verdict = _measure(path, expected, progress, ())
    release()
    return verdict


def _measure(path: Path, expected: Expected, progress: OnFraction, passes: Sequence[Pass]) -> Verdict:
    """The verdict on the package, its program rewritten by ``passes``."""
    from diffusion_runtime.backends.torch_mil import TorchBackend
    from diffusion_runtime.mil.fuse import fuse

    progress(0.0)
    model = TorchBackend(stream_weights=True, fuse=False).load(path)
    fuse(model.module, passes)
    count = sum(node.op == "call_function" for node in model.module.graph.nodes) * len(expected.inputs)
    largest: dict[str, float] = {}
    seen: set[tuple[int, str]] = set()  # some values come in parts

    def watch(run: int, name: str, op: str, value: torch.Tensor) -> None:
        seen.add((run, name))
        if len(seen) % 50 == 0:
            progress(min(len(seen) / count, 1.0))
        if op not in MOVES and value.is_floating_point() and value.numel():
            # Not `aminmax`, which takes sixty times as long where the channels lie last.
            largest[name] = _most((largest.get(name, 0.0), -float(value.amin()), float(value.amax())))

    made = tuple(model.observe_all(watch, expected.inputs))
    progress(1.0)
    return Verdict(_worst(expected, made), largest, made)


def _worst(expected: Expected, made: Sequence[Arrays]) -> dict[str, float]:
    """The lowest PSNR of each output."""
    worst: dict[str, float] = {}
    for found, outputs in zip(made, expected.outputs, strict=True):
        for name, array in outputs.items():
            worst[name] = min(worst.get(name, math.inf), psnr_db(array, found[name]))
    return worst


def psnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Peak signal-to-noise ratio with the largest magnitude of ``expected`` as the peak; -inf where ``found`` is
    not finite, or ``expected`` is zero and ``found`` is not."""
    difference = found.astype(np.float64) - expected
    power = float(np.mean(difference**2))
    peak = float(np.max(np.abs(expected)))
    if not math.isfinite(power) or (peak == 0 and power > 0):
        return -math.inf
    return min(BEST_PSNR_DB, 10 * math.log10(peak**2 / power)) if power else BEST_PSNR_DB


def overflowing(path: Path, largest: Mapping[str, float], limit: float) -> dict[str, float]:
    """The values of the package at ``path`` that are float16 and were larger than ``limit``, and what is computed
    of them, by name, with the size."""
    from diffusion_runtime.mil.observe import SCORES

    package = open_package(path)
    found: dict[str, float] = {}
    known = dict(largest)
    for operation in operations(package.model.function.block):
        taken = _most(known.get(name, 0.0) for name in _taken(operation))
        for variable in operation.outputs:
            if operation.type in MOVES:
                known[variable.name] = _most((taken, known.get(variable.name, 0.0)))
            half = isinstance(variable.type, TensorType) and variable.type.dtype is DType.FLOAT16
            sizes = (known.get(variable.name, 0.0), known.get(variable.name + SCORES, 0.0), taken)
            hot = [size for size in sizes if size > limit or math.isnan(size)]
            if half and hot:
                found[variable.name] = _most(hot)
    return found


def _most(sizes: Iterable[float]) -> float:
    """The largest, at least 0; nan, which `max` passes over, where one is."""
    return float(np.max([0.0, *sizes]))


def check(component: Component, path: Path, verdict: Verdict, explain: Callable[[], str]) -> None:
    """Raises VerificationError where an output is below the component's bound; ``explain`` says where it begins."""
    low = {name: value for name, value in verdict.psnr_db.items() if not value >= component.min_psnr_db}
    if low:
        listed = ", ".join(f"{name} {value:.1f} dB" for name, value in low.items())
        raise VerificationError(
            f"{path.name}: differs from the checkpoint's own network: {listed}, expected at least "
            f"{component.min_psnr_db:g} dB; {explain()}"
        )


def first_divergence(path: Path, network: torch.nn.Module, modules: Mapping[str, str], inputs: Arrays) -> str:
    """Where the package at ``path`` and ``network``, which it was traced from, begin to differ, as a sentence.

    Modules' outputs are compared by statistics that do not depend on the order of the elements, as a program may
    hold a value in another layout.
    """

    from diffusion_runtime.backends.torch_mil import TorchBackend

    expected = _module_outputs(network, inputs)
    last = {module: operation for operation, module in modules.items()}
    found: list[str] = []

    def watch(name: str, op: str, value: torch.Tensor) -> None:
        module = modules.get(name, "")
        if last.get(module) != name or module not in expected or found:
            return
        count, *statistics = _statistics(value)
        if count == expected[module][0] and not np.allclose(statistics, expected[module][1:], rtol=1e-2, atol=1e-4):
            found.append(f"the first operation that differs is {name} ({op}, of torch module {module})")

    TorchBackend(stream_weights=True, fuse=False).load(path).observe(watch, **inputs)
    return found[0] if found else "no single operation differs"


@contextmanager
def widened(network: torch.nn.Module) -> Iterator[None]:
    """In this context, ``network`` computes in float32 whatever its tensors are stored as.

    A module's own parameters and buffers are widened as it is called and dropped after, and what is mapped from a
    file is let go of, so such a network never lies in memory as a whole. The next module's are read from the disk
    meanwhile.
    """
    import torch

    stored: dict[torch.nn.Module, list[tuple[dict[str, Any], str, torch.Tensor]]] = {}
    order = [module for module in network.modules() if any(True for _ in _own(module))]
    follower = dict(itertools.pairwise(order))

    def widen(module: torch.nn.Module, _: Any) -> None:
        for tensor in _own(follower[module]) if module in follower else ():
            expect(tensor)
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        stored[module] = [
            (place, name, tensor)
            for place in places
            for name, tensor in place.items()
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32
        ]
        for place, name, tensor in stored[module]:
            wide = tensor.detach().float()
            place[name] = torch.nn.Parameter(wide, requires_grad=False) if place is module._parameters else wide

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for place, name, tensor in stored.pop(module, []):
            place[name] = tensor
        for tensor in _own(module):
            let_go(tensor)

    handles = []
    for module in order:
        handles.append(module.register_forward_pre_hook(widen))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The module's tensors without its children's."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _module_outputs(network: torch.nn.Module, inputs: Arrays) -> dict[str, tuple[float, ...]]:
    """Statistics of what each module gives, by its path."""
    import torch

    found: dict[str, tuple[float, ...]] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, value, name=name: (
                found.update({name: _statistics(value)}) if isinstance(value, torch.Tensor) else None
            )
        )
        for name, module in network.named_modules()
    ]
    try:
        with widened(network), torch.inference_mode():
            network(*(torch.from_numpy(array).float() for array in inputs.values()))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _statistics(value: torch.Tensor) -> tuple[float, ...]:
    wide = value.double()
    low, high = wide.aminmax()
    return (float(value.numel()), float(wide.mean()), float(wide.square().mean().sqrt()), float(low), float(high))


def _taken(operation: Any) -> Iterator[str]:
    for bindings in operation.inputs.values():
        yield from (binding for binding in bindings if isinstance(binding, str))
