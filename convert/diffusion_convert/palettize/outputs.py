"""What palettization does to outputs: seeded inputs, comparison, bounds below which nothing is written."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_convert.verification.bounds import MIN_PSNR_DB, bound_db
from diffusion_convert.verification.compare import psnr_db
from diffusion_convert.verification.known_runs import KnownRuns, Run
from diffusion_runtime.backends import TensorSpec
from diffusion_runtime.errors import InputError, VerificationError
from diffusion_runtime.mil.package import Package, open_package
from diffusion_runtime.mil.program import TensorType, operations

if TYPE_CHECKING:
    from diffusion_runtime.backends.torch_mil import TorchModel

_TIMESTEPS = 1000
_TOKENS = 49408
_MOST_BYTES = 1 << 31  # of an .npz file's arrays: a thousand calls of SDXL's UNet
_TOGETHER = 2
"""Calls side by side: what is computed for each is in memory at once."""
_STEADY_DB = 30.0
"""Where inputs change by a thousandth (60 dB), outputs with less than this change thirty times as much."""

Samples = Sequence[Mapping[str, np.ndarray]]
"""Inputs of some calls, each by name."""


def seeded_inputs(
    specs: Mapping[str, TensorSpec], count: int, seed: int = 0, tokens: int = _TOKENS
) -> list[dict[str, np.ndarray]]:
    """``count`` sets of inputs in the ranges that models with these input names meet in use; timesteps are spread
    over the schedule, the first near its noisy end; token ids are below ``tokens``."""
    random = np.random.default_rng(seed)
    return [
        {name: _draw(spec, random, 1 - (2 * index + 1) / (2 * count), tokens) for name, spec in specs.items()}
        for index in range(count)
    ]


def token_count(package: Package) -> int:
    """The rows of the smallest table that ``gather`` looks ids up in; CLIP's number of tokens without one."""
    rows = [_TOKENS]
    for function in package.model.program.functions.values():
        tables = {
            operation.outputs[0].name: operation.outputs[0].type.shape
            for operation in operations(function.block)
            if (operation.type == "const" or operation.type.startswith("constexpr_"))
            and isinstance(operation.outputs[0].type, TensorType)
        }
        for operation in operations(function.block):
            for name in operation.inputs.get("x", ()) if operation.type == "gather" else ():
                shape = tables.get(name, ()) if isinstance(name, str) else ()
                rows += [shape[0]] if len(shape) == 2 and shape[0] else []
    return min(rows)


def _draw(spec: TensorSpec, random: np.random.Generator, position: float, tokens: int) -> np.ndarray:
    if spec.name == "timestep":
        array = np.full(spec.shape, round(position * (_TIMESTEPS - 1)))
    elif spec.name == "input_ids":
        array = random.integers(0, tokens, spec.shape)
    elif spec.name in ("controlnet_cond", "images"):
        array = random.uniform(0, 1, spec.shape)
    elif spec.name == "time_ids":
        array = np.broadcast_to(np.array([1024, 1024, 0, 0, 1024, 1024])[: spec.shape[-1]], spec.shape)
    elif spec.name == "x" and len(spec.shape) == 4 and spec.shape[1] == 3:
        array = random.uniform(-1, 1, spec.shape)
    elif np.issubdtype(np.dtype(spec.dtype), np.integer) or spec.name == "class_labels":
        array = random.integers(0, 2, spec.shape)
    else:
        array = random.standard_normal(spec.shape)
    return array.astype(spec.dtype)


def outputs_of_both(
    reference: Path,
    other: Path,
    samples: Samples | None = None,
    function: str | None = None,
    expected: Samples | None = None,
    known: KnownRuns | None = None,
) -> tuple[Samples, Samples]:
    """What both packages make of ``samples`` (None: two seeded ones), run by the torch backend, one after the other
    and with their weights left in the file. ``function``: which of several. ``expected``: what ``reference`` makes
    of ``samples``, where it has been run already. A package with the same program as one of those ``known`` is not
    run.

    Raises VerificationError where an output of ``reference`` itself is not finite: nothing can be compared with it.
    """
    model = None
    if samples is None:
        model = _load(reference, function)  # which refuses inputs that no memory has room for
        samples = seeded_inputs(model.inputs, 2, tokens=token_count(open_package(reference)))
    if expected is None:
        with np.errstate(over="ignore", invalid="ignore"):  # said below, by name
            expected = _run(model, samples) if model else _computed(reference, samples, function, known)
    del model  # or its weights stay mapped
    _require_finite(reference, samples, expected)
    return expected, _computed(other, samples, function, known)


def _load(package: Path, function: str | None) -> TorchModel:
    from diffusion_runtime.backends.torch_mil import TorchBackend

    return TorchBackend(stream_weights=True).load(package, function=function)


def _computed(package: Path, samples: Samples, function: str | None, known: KnownRuns | None) -> Samples:
    """What the package makes of ``samples``."""

    def run() -> Run:
        return _run(_load(package, function), samples), {}

    if known is None or function is not None:
        return run()[0]
    return known.once(package, samples, run, watched=False)[0]


def lowest_psnr_db(expected: Samples, found: Samples) -> dict[str, float]:
    """By output, the lowest PSNR over all calls."""
    return {
        name: min(psnr_db(one[name], two[name]) for one, two in zip(expected, found, strict=True))
        for name in expected[0]
    }


def _run(model: TorchModel, samples: Samples) -> list[dict[str, np.ndarray]]:
    """What ``model`` makes of ``samples``, a few at a time: each weight is read once for those."""
    return [
        outputs
        for start in range(0, len(samples), _TOGETHER)
        for outputs in model.observe_all(None, samples[start : start + _TOGETHER])
    ]


def _require_finite(package: Path, samples: Samples, outputs: Samples) -> None:
    """The bits are not to blame for what the package computes without them."""
    for what, arrays in (("input", samples), ("output", outputs)):
        bad = sorted({name for one in arrays for name, array in one.items() if not np.isfinite(array).all()})
        if bad:
            raise VerificationError(
                f"{package}: its own {what} {', '.join(bad)} is infinite or undefined on the inputs that it is "
                "checked with, whatever the bits"
            )


def load_samples(path: Path, specs: Mapping[str, TensorSpec]) -> list[dict[str, np.ndarray]]:
    """The inputs in an .npz file, one array for each input by its name: of the input's shape, or with one more
    dimension in front for several calls. Raises InputError for a file that is no .npz or does not fit."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: cannot be read as an .npz file: it is not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size <= _MOST_BYTES:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: np.asarray(file[name]) for name in file.files}  # bytes where it is no array
    except Exception as error:  # numpy lets anything through: zlib.error, tokenize.TokenError, MemoryError …
        raise InputError(f"{path}: cannot be read as an .npz file: {error}") from error
    if size > _MOST_BYTES:
        raise InputError(f"{path}: unfolds to {size / 1e9:.1f} GB, expected at most {_MOST_BYTES / 1e9:.1f} GB")
    if set(arrays) != set(specs):
        raise InputError(f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}; expected {', '.join(specs)}")
    stacked = {name: array[None] if array.shape == specs[name].shape else array for name, array in arrays.items()}
    for name, array in stacked.items():
        if array.shape[1:] != specs[name].shape or array.dtype.kind not in "fiu":
            raise InputError(f"{path}: {name} is {array.dtype} {array.shape}; expected numbers {specs[name].shape}")
    counts = {len(array) for array in stacked.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(
            f"{path}: holds {sorted(counts)} calls by input; expected the same number of each, 1 or more"
        )
    return [
        {name: array[call].astype(specs[name].dtype) for name, array in stacked.items()} for call in range(*counts)
    ]


def require_outputs(
    package: Path, psnr: Mapping[str, float], average_bits: float, bounds: Mapping[int, float] = MIN_PSNR_DB
) -> None:
    """Raise VerificationError, naming each output, where one is below the bound of its bit width."""
    bound = bound_db(average_bits, bounds)
    low = [f"{name} has {value:.1f} dB" for name, value in psnr.items() if not value >= bound]
    if low:
        raise VerificationError(
            f"{package.name}: at {average_bits:g} bits {', '.join(low)} against the float16 package, expected at "
            f"least {bound:.1f} dB: nothing is written; use more bits or --target-bits"
        )


def require_steady(
    package: Path, samples: Samples | None, psnr: Mapping[str, float], bound: float, function: str | None = None
) -> None:
    """Raise VerificationError, naming them, where outputs below ``bound`` are others without palettization, too,
    when the inputs of ``package`` change by a thousandth: they say nothing about the bits."""
    model = _load(package, function)
    if samples is None:
        samples = seeded_inputs(model.inputs, 2, tokens=token_count(open_package(package)))
    random = np.random.default_rng(1)
    worst = dict.fromkeys(psnr, np.inf)
    for arrays in samples:
        moved = {name: _moved(array, random) for name, array in arrays.items()}
        expected, found = _run(model, [arrays, moved])
        for name in psnr:
            worst[name] = min(worst[name], psnr_db(expected[name], found[name]))
    least = min(bound, _STEADY_DB)
    if chaotic := [name for name, value in psnr.items() if not value >= bound and not worst[name] >= least]:
        low = min(worst[name] for name in chaotic)
        raise VerificationError(
            f"{package}: its own output {', '.join(chaotic)} is chaotic on the inputs that it is checked with, "
            f"whatever the bits: it has {low:.1f} dB where they change by a thousandth"
        )


def _moved(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Floats changed by up to a thousandth, as float16 rounds; whole numbers as they are."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return (array * (1 + random.uniform(-1e-3, 1e-3, array.shape))).astype(array.dtype)
