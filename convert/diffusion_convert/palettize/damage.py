"""How much each weight's palettization hurts the outputs, measured for all weights at once by the torch backend.

With J the Jacobian of the outputs by a weight's elements and d the change of those, the outputs move by J d. For a
random direction v (independent, unit variance) the gradient g of v·outputs has E g² = Σ_o J_o², so one backward
pass per sample gives, for every weight at once, the expected |J d|² = Σ g² d² of an error d whose elements do not
depend on each other; k-means' errors are of that kind (each cluster's sum to zero). g² is averaged over the weight:
damage at b bits = mean g² x squared error at b bits. Errors of different weights add up.

A test compares this with the error of the outputs when one weight at a time is really palettized.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_convert.palettize.outputs import Samples, seeded_inputs, token_count
from diffusion_convert.palettize.palette import TOGETHER
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.palettize_package import errors_as, stored_array
from diffusion_convert.palettize.select import Weight, palettizable
from diffusion_runtime.memory import release
from diffusion_runtime.mil.package import Package, open_package

if TYPE_CHECKING:
    import torch
    from torch import fx
    from torch.utils.checkpoint import CheckpointPolicy

    from diffusion_runtime.backends import TensorSpec
    from diffusion_runtime.backends.torch_mil import TorchModel

SAMPLES = 4
LARGE = 1 << 27
"""Elements of weights beyond which a package is large: 0.3 GB. Two rows of samples do for one, one call of a usual
UNet: what v leaves to chance falls with the number of independent outputs, tens of thousands here, and the
timestep matters little. For SD 1.5's UNet, bits that two calls or one chose cost 0.001 and 0.004 dB more than those
of four; mixed bits gain 16 dB."""
_SEGMENTS = 24
_CACHED = 1 << 18


@dataclass(frozen=True, slots=True)
class Damage:
    """``relative_error[name][bits]``: the expected energy of the outputs' error over the outputs' energy, averaged
    over samples, where that weight alone is palettized. ``sizes`` counts elements. ``peak_to_energy`` turns
    such a number into PSNR."""

    relative_error: Mapping[str, Mapping[int, float]]
    sizes: Mapping[str, int]
    peak_to_energy: float


def measure_damage(
    path: Path, options: PalettizeOptions, candidates: Sequence[int], samples: Samples | None = None, seed: int = 0
) -> Damage:
    """The damage of each of ``candidates`` (bits) to each weight that ``options`` may palettize in ``path``.

    One forward and one backward pass per sample (None: as `drawn`); for a large package in bfloat16 where the
    processor multiplies it: that takes half the time and memory, and moves a weight's damage by a hundredth, where
    the next width makes it four times as large. Whether the chosen bits will do is decided in float32 (`checked`).
    """
    from diffusion_runtime.backends.torch_mil import TorchBackend
    from diffusion_runtime.mil.fuse import DIFFERENTIABLE, fuse

    package = open_package(path)
    weights = palettizable(package, options.embeddings)
    elements = sum(weight.size for weight in weights.values())
    model = TorchBackend(dtype=_dtype(elements), fuse=False).load(path)
    fuse(model.module, DIFFERENTIABLE)  # less time and, at full size, half of the memory
    inputs = samples or drawn(model.inputs, elements, seed, token_count(package))
    sensitivity, ratio = _sensitivities(model, weights, inputs, seed)
    del model
    errors = _squared_errors(package, options, weights, candidates)
    relative = {
        name: {bits: sensitivity[name] * error for bits, error in by_bits.items()}
        for name, by_bits in errors.items()
    }
    return Damage(relative, {name: weight.size for name, weight in weights.items()}, ratio)


def drawn(specs: Mapping[str, TensorSpec], elements: int, seed: int, tokens: int) -> Samples:
    """Seeded inputs for a package of so many elements: four sets, or two rows. Each row has a timestep of its own;
    together they are spread over the schedule."""
    timestep = specs.get("timestep")
    rows = math.prod(timestep.shape) if timestep else 1
    count = SAMPLES if elements <= LARGE else -(-2 // rows)
    inputs = seeded_inputs(specs, count, seed, tokens)
    if timestep:
        every = seeded_inputs({"timestep": timestep}, count * rows)
        for index, arrays in enumerate(inputs):
            times = [one["timestep"].flat[0] for one in every[index::count]]
            arrays["timestep"] = np.array(times, timestep.dtype).reshape(timestep.shape)
    return inputs


def _dtype(elements: int) -> str:
    """What gradients by so many elements are computed in."""
    import torch

    # Averages over small weights keep more of the rounding, and take no time anyway.
    return "bfloat16" if elements > LARGE and torch.cpu._is_avx512_bf16_supported() else "float32"


def _squared_errors(
    package: Package, options: PalettizeOptions, weights: Mapping[str, Weight], candidates: Sequence[int]
) -> dict[str, dict[int, float]]:
    def errors(batch: Sequence[Weight]) -> list[dict[int, float]]:
        return errors_as(options, [(weight, stored_array(package, weight.value)) for weight in batch], candidates)

    every = list(weights.values())
    batches = [every[start : start + TOGETHER] for start in range(0, len(every), TOGETHER)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = [one for batch in pool.map(errors, batches) for one in batch]
    return dict(zip(weights, found, strict=True))


def _sensitivities(
    model: TorchModel, weights: Mapping[str, Weight], samples: Samples, seed: int
) -> tuple[dict[str, float], float]:
    """Mean g² of each weight over samples, relative to the outputs' energy; and the outputs' mean peak² / power."""
    import torch

    leaves = _leaves(model.module, weights)
    total = dict.fromkeys(weights, 0.0)
    energy = 1.0

    def collect(name: str) -> Callable[[torch.Tensor], None]:
        def hook(leaf: torch.Tensor) -> None:
            if leaf.grad is not None:
                total[name] += _mean_square(leaf.grad) / energy / len(samples)
                leaf.grad = None

        return hook

    hooks = [
        leaf.register_post_accumulate_grad_hook(collect(name))  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items()
    ]
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for arrays in samples:
        outputs = _run(model, arrays, leaves)
        flat = torch.cat([value.reshape(-1).float() for value in outputs.values() if value.is_floating_point()])
        energy = float(flat.detach().square().sum())
        ratios.append(float(flat.detach().abs().max()) ** 2 * flat.numel() / energy)
        torch.dot(flat, torch.randn(flat.shape, generator=generator)).backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return total, float(np.mean(ratios))


def _mean_square(gradient: torch.Tensor) -> float:
    """Of a few elements at a time: squares of a whole weight are new memory, which costs what the gradient does."""
    flat = gradient.reshape(-1)
    parts = (flat[start : start + _CACHED].float() for start in range(0, flat.numel(), _CACHED))
    return sum(float(part.dot(part)) for part in parts) / flat.numel()


def _leaves(module: fx.GraphModule, weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """The buffers that hold ``weights``, as leaves of the gradient's graph (the buffers' own memory)."""
    return {
        node.meta["mil"]: getattr(module, str(node.target)).detach().requires_grad_()
        for node in module.graph.nodes
        if node.op == "get_attr" and node.meta.get("mil") in weights
    }


def _run(
    model: TorchModel, arrays: Mapping[str, np.ndarray], leaves: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run the graph in segments, each run again in the backward pass instead of keeping its values in memory, but
    for those that take most of the time."""
    import torch
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    nodes = list(model.module.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    values: dict[fx.Node, Any] = {}
    for node, (name, dtype) in zip(nodes, model.order, strict=False):
        values[node] = torch.from_numpy(np.array(arrays[name])).to(dtype)
    length = -(-len(nodes) // _SEGMENTS)
    for start in range(len(values), len(nodes) - 1, length):
        end = min(start + length, len(nodes) - 1)

        def segment(
            given: dict[fx.Node, Any], part: Sequence[fx.Node] = tuple(nodes[start:end]), end: int = end
        ) -> dict[fx.Node, Any]:
            release()  # what is kept lies between what is not: without this the peak is 0.9 GB higher
            return _run_nodes(model.module, part, given, leaves, lambda node: last_use[node] >= end)

        values = checkpoint(
            segment, values, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _is_kept)
        )
    outputs: dict[str, fx.Node] = nodes[-1].args[0]
    return {name: values[node] for name, node in outputs.items()}


def _is_kept(_context: object, operation: object, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """Whether what ``operation`` gives is kept for the backward pass: attention, and convolutions but those that
    widen. They are nearly all of the time, and less than half of the memory."""
    import torch
    from torch.utils.checkpoint import CheckpointPolicy

    kept = operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    if operation is torch.ops.aten.convolution.default:
        x, weight = arguments[:2]
        kept = weight.shape[0] <= x.shape[1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _run_nodes(
    module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    given: Mapping[fx.Node, Any],
    leaves: Mapping[str, torch.Tensor],
    is_live: Callable[[fx.Node], bool],
) -> dict[fx.Node, Any]:
    """The values after ``nodes`` ran that ``is_live`` says are used later."""
    from torch import fx

    values = dict(given)
    for node in nodes:
        if node.op == "get_attr":
            leaf = leaves.get(node.meta.get("mil", ""))
            values[node] = getattr(module, str(node.target)) if leaf is None else leaf
        elif callable(node.target):
            values[node] = node.target(
                *fx.node.map_arg(node.args, values.__getitem__), **fx.node.map_arg(node.kwargs, values.__getitem__)
            )
    return {node: value for node, value in values.items() if is_live(node)}
