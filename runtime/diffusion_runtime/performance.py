"""What `bench` finds out: how fast each model runs where, and whether it computes there what it should.

Each component runs on each compute unit, on inputs as a picture would give it. They are compared with what the
torch backend computes of the same inputs in float32. A report names no folder, file, host or user: it can be
attached to an issue.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_runtime.backends import Backend, ComputeUnits, Model
from diffusion_runtime.backends.coreml import operation_devices
from diffusion_runtime.bundle.find import Bundle
from diffusion_runtime.errors import DiffusionError
from diffusion_runtime.families import DENOISERS, T5
from diffusion_runtime.models import chained
from diffusion_runtime.processes import peak_memory
from diffusion_runtime.prompt import tokenizer

if TYPE_CHECKING:
    from diffusion_runtime.prompt.tokenizer import Tokenizer

MIN_PSNR_DB = 30.0
"""Below it a unit computes something else. float16 on a GPU or the Neural Engine leaves 40 dB and more."""
BEST_PSNR_DB = 200.0
LIBRARIES = ("coreml-sd", "coremltools", "torch", "diffusers")
FORMAT_VERSION = 1
PROMPT = "a photograph of an astronaut riding a horse"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One component on one compute unit. ``psnr_db`` is the worst of its outputs against the torch backend;
    ``devices``: how many of its operations Core ML plans to run where; ``error``: why there is nothing else."""

    component: str
    backend: str
    compute_units: str | None
    load_seconds: float | None = None
    first_call_seconds: float | None = None
    steady_seconds: float | None = None
    psnr_db: float | None = None
    peak_memory_bytes: int | None = None
    devices: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether it ran, and computed what the torch backend computes."""
        return self.error is None and (self.psnr_db is None or self.psnr_db >= MIN_PSNR_DB)


@dataclass(frozen=True, slots=True)
class Report:
    """All measurements, with what is known of the machine and of the models."""

    machine: Mapping[str, Any]
    models: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    pictures_per_minute: Mapping[str, float]
    steps: int

    def as_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def measure(
    bundle: Bundle,
    components: Sequence[str],
    backend: tuple[str, Backend],
    units: Sequence[ComputeUnits | None],
    runs: int,
    check: bool = True,
) -> Iterator[Measurement]:
    """Measure ``components`` of a bundle on a backend (its name, and it) and each of ``units`` (None: its own), one
    after the other, as each is done. A unit that fails is a measurement with an error: the others go on.

    With ``check`` each is compared with the torch backend in float32, unless it is that."""
    from diffusion_runtime.backends.torch_mil import TorchBackend

    torch_backend = TorchBackend()
    lengths = bundle.text_lengths()
    tokens = tokenizer.load(bundle.tokenizer, lengths[0]) if bundle.tokenizer and lengths else None

    def load(component: str) -> Model:
        return chained(
            [partial(torch_backend.load, path, ComputeUnits.CPU_ONLY) for path in bundle.paths(component)]
        )()

    inputs = inputs_of(bundle, tokens, load)
    name, loads = backend
    for component in components:
        expected = load(component)(**inputs[component]) if check and name != "torch" else None
        for unit in units:
            chosen = unit or ComputeUnits(bundle.manifest.components[component].compute_units)
            yield _measured(bundle, component, name, loads, chosen, runs, inputs[component], expected)
            gc.collect()  # a model of several GB is freed before the next is loaded


def report(bundle: Bundle, measurements: Sequence[Measurement], steps: int) -> Report:
    """The measurements with what is known of machine and models; pictures per minute of ``steps`` steps, guided."""
    batch = bundle.manifest.batch_size
    rates = pictures_per_minute(measurements, steps, 1 if batch == 2 else 2)
    return Report(machine(), described(bundle), tuple(measurements), rates, steps)


def inputs_of(
    bundle: Bundle, tokens: Tokenizer | None, reference: Callable[[str], Model]
) -> dict[str, dict[str, Any]]:
    """Inputs by component as a picture would give them, seeded. ``reference`` loads a component, to encode a prompt
    with; ``tokens`` None: there is no tokenizer."""
    rng = np.random.default_rng(0)
    latents = bundle.manifest.latents
    found: dict[str, dict[str, Any]] = {}
    encoded: dict[str, np.ndarray] = {}
    for name, component in bundle.manifest.components.items():
        known = None if name == T5 else tokens  # another tokenizer's
        found[name] = {
            tensor.name: _drawn(tensor.name, tensor.shape, rng, latents.scale, known, encoded).astype(tensor.dtype)
            for tensor in component.inputs or reference(name).inputs.values()  # not every manifest lists them
        }
        if name.startswith("text_encoder"):
            outputs = reference(name)(**found[name])
            states = next((outputs[key] for key in ("hidden_embeds", "last_hidden_state") if key in outputs), None)
            if states is not None:
                rows = states.transpose(0, 2, 1)[:, :, None]
                together = [encoded["states"], rows] if "states" in encoded else [rows]
                encoded["states"] = np.concatenate(together, axis=1)
            if "pooled_outputs" in outputs:
                encoded["text_embeds"] = outputs["pooled_outputs"]
    return found


def _drawn(
    name: str,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    scale: float,
    tokens: Tokenizer | None,
    encoded: Mapping[str, np.ndarray],
) -> np.ndarray:
    """An input by what it means; an unknown one is noise."""
    if name == "input_ids":
        return rng.integers(0, 100, shape) if tokens is None else np.resize(tokens.encode(PROMPT).ids[0], shape)
    known = {"encoder_hidden_states": encoded.get("states"), "text_embeds": encoded.get("text_embeds")}.get(name)
    if known is not None and known.shape[1:3] == shape[1:3]:
        return np.resize(known, shape)  # repeated to the rows of the batch
    plain = {"timestep": 801.0, "adjustment": 0.0, "class_labels": 20.0}
    if name in plain:
        return np.full(shape, plain[name])
    if name == "time_ids":
        return np.resize(np.array([1024.0, 1024, 0, 0, 1024, 1024][: shape[1]]), shape)
    if name == "images":
        return rng.random(shape)
    if name in ("x", "image", "pixel_values"):
        return rng.uniform(-1, 1, shape)
    noise = rng.standard_normal(shape)
    return noise / scale if name in ("z", "latent") else noise


def _measured(
    bundle: Bundle,
    component: str,
    name: str,
    backend: Backend,
    unit: ComputeUnits,
    runs: int,
    inputs: Arrays,
    expected: Arrays | None,
) -> Measurement:
    told = unit.value if name == "coreml" else None
    try:
        started = time.perf_counter()
        model = chained([partial(backend.load, path, unit) for path in bundle.paths(component)])()
        loaded = time.perf_counter()
        outputs = model(**inputs)
        first = time.perf_counter()
        steady = []
        for _ in range(runs):
            begun = time.perf_counter()
            model(**inputs)
            steady.append(time.perf_counter() - begun)
    except DiffusionError as error:
        return Measurement(component, name, told, error=_without_paths(str(error), bundle))
    return Measurement(
        component,
        name,
        told,
        loaded - started,
        first - loaded,
        float(np.median(steady)),
        None if expected is None else min(_psnr_db(value, outputs[key]) for key, value in expected.items()),
        peak_memory(),
        _devices(bundle, component, unit) if name == "coreml" else {},
    )


def _devices(bundle: Bundle, component: str, unit: ComputeUnits) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for path in bundle.paths(component):
        total.update(operation_devices(path, unit))
    return dict(total)


def _without_paths(text: str, bundle: Bundle) -> str:
    """A message without the folder of the models, which may name its user."""
    folder = bundle.folder
    for path in (folder.resolve(), folder.absolute(), folder):
        text = text.replace(f"{path}{os.sep}", "")
    return text


def _psnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    wide, other = expected.astype(np.float64), found.astype(np.float64).reshape(expected.shape)
    power, peak = float(np.mean((wide - other) ** 2)), float(np.max(np.abs(wide)))
    if not math.isfinite(power) or (peak == 0 and power > 0):
        return -BEST_PSNR_DB
    return min(BEST_PSNR_DB, 10 * math.log10(peak**2 / power)) if power else BEST_PSNR_DB


def pictures_per_minute(measurements: Sequence[Measurement], steps: int, calls_per_step: int) -> dict[str, float]:
    """By compute unit: with every component on it, guided, of ``steps`` steps, without what few tasks need."""
    found: dict[str, float] = {}
    for unit in dict.fromkeys(one.compute_units or one.backend for one in measurements):
        seconds = {
            one.component: one.steady_seconds
            for one in measurements
            if (one.compute_units or one.backend) == unit and one.steady_seconds is not None and one.is_right
        }
        encoders = [name for name in seconds if name.startswith("text_encoder")]
        step = next((seconds[name] for name in DENOISERS if name in seconds), None)
        if not encoders or step is None or "vae_decoder" not in seconds:
            continue
        whole = 2 * sum(seconds[name] for name in encoders)
        whole += steps * calls_per_step * step + seconds["vae_decoder"] + seconds.get("safety_checker", 0)
        found[unit] = 60 / whole
    return found


def machine() -> dict[str, Any]:
    """What a reader of a report needs to know: processor, memory, system, versions. No names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()}"
    return {
        "architecture": platform.machine(),
        "memory_bytes": memory,
        "processor": _processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "system": system,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def described(bundle: Bundle) -> dict[str, Any]:
    """The models without their names: family, variant, sizes, bits."""
    made = bundle.manifest
    return {
        "attention": made.attention,
        "batch_size": made.batch_size,
        "components": {
            name: {
                "bits": component.palettization.nbits if component.palettization else None,
                "models": len(component.files),
                "precision": component.precision,
                "size_bytes": component.size_bytes,
            }
            for name, component in made.components.items()
        },
        "family": made.family,
        "height": made.height,
        "kind": made.kind,
        "target": made.target,
        "width": made.width,
    }
