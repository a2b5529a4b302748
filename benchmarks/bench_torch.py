"""The torch backend beside diffusers: seconds to load, seconds per UNet step and peak memory, float32 on the CPU.

    python benchmarks/bench_torch.py FOLDER [NAME ...] [--openvino VENV]

of the original package, the same at 6 bits, and split_einsum_v2, each made in FOLDER where it is missing; of the
same UNet by torch.compile, which needs a C++ compiler, and by OpenVINO in float32 and as it chooses
(bfloat16 where the processor has it). OpenVINO is no dependency of ours: VENV is a virtual environment of the same
Python that has it (or $OPENVINO), made by ``python -m venv VENV && VENV/bin/pip install openvino``. What
cannot be measured here is said to be so. Each side runs in a process of its own. On a shared machine compare
processor seconds: their ratio hardly depends on what else is running, which that of wall seconds does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import command_line
from diffusion_runtime.processes import peak_memory
from full_size import full_size_unet
from full_size_checkpoint import SD1_UNET

TOKENS = 77


Step = Callable[[], object]


def diffusers_network() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """diffusers' UNet with random weights, and inputs of a step."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel.from_config(dict(SD1_UNET)).eval().requires_grad_(False)
    size, width = SD1_UNET["sample_size"], SD1_UNET["cross_attention_dim"]
    latents, states = torch.randn(2, SD1_UNET["in_channels"], size, size), torch.randn(2, TOKENS, width)
    return network, (latents, torch.full((2,), 981.0), states)


def diffusers_step(compiled: bool = False) -> Step:
    network, inputs = diffusers_network()
    run = torch.compile(network) if compiled else network

    def step() -> object:
        with torch.inference_mode():
            return run(*inputs, return_dict=False)

    return step


def openvino_step(precision: str = "") -> Step:
    """``precision``: of OpenVINO's hints; "": what it chooses."""
    openvino: Any = importlib.import_module("openvino")
    network, inputs = diffusers_network()
    with torch.no_grad():
        converted = openvino.convert_model(network, example_input=inputs)
    del network
    options = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    request = openvino.compile_model(converted, "CPU", options).create_infer_request()
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: request.infer(arrays)


def backend_step(package: Path) -> Step:
    import numpy as np

    from diffusion_runtime.backends.torch_mil import TorchBackend

    model = TorchBackend().load(package)
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(spec.shape).astype(spec.dtype) for name, spec in model.inputs.items()}
    return lambda: model(**arrays)


OTHERS: dict[str, Callable[[], Step]] = {
    "diffusers": diffusers_step,
    "torch.compile": lambda: diffusers_step(compiled=True),
    "openvino, f32": lambda: openvino_step("f32"),
    "openvino": openvino_step,
}


def measure(side: str, steps: int, threads: int) -> dict[str, float]:
    """Figures of one of `OTHERS` or of a package. The first step, which warms up and compiles, does not count."""
    torch.set_num_threads(threads)
    started = time.perf_counter(), time.process_time()
    step = OTHERS[side]() if side in OTHERS else backend_step(Path(side))
    loaded = time.perf_counter() - started[0], time.process_time() - started[1]
    step()
    wall, processor = [], []
    for _ in range(steps):
        begun = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - begun[0])
        processor.append(time.process_time() - begun[1])
    return {
        "load_seconds": loaded[0],
        "load_processor_seconds": loaded[1],
        "step_seconds": min(wall),
        "step_processor_seconds": min(processor),
        "peak_gb": peak_memory() / 1e9,
    }


def apart(side: str, steps: int, threads: int, venv: Path | None = None) -> dict[str, float] | str:
    """``measure`` in a process of its own, or in one line why it could not be."""
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps), "--threads", str(threads)]
    command += [] if venv is None else ["--openvino", str(venv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1][:150]
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def six_bits(folder: Path) -> Path:
    from diffusion_convert.palettize.palettize_options import PalettizeOptions
    from diffusion_convert.palettize.palettize_package import palettize_package

    path = folder / "unet_6bit.mlpackage"
    if not path.exists():
        palettize_package(full_size_unet(folder), path, PalettizeOptions(bits=6))
    return path


def split(folder: Path) -> Path:
    from diffusion_runtime.families import AttentionKind

    return full_size_unet(folder, AttentionKind.SPLIT_EINSUM_V2)


PACKAGES: dict[str, Callable[[Path], Path]] = {
    "original": full_size_unet,
    "6-bit": six_bits,
    "split_einsum_v2": split,
}


def show(folder: Path, names: list[str], steps: int, threads: int, rounds: int, venv: Path | None) -> None:
    """Print a table of figures, in ratio to diffusers'. Each is the best of all rounds: a machine that others use,
    too, is slower for minutes."""
    sides = {name: name if name in OTHERS else str(PACKAGES[name](folder)) for name in ("diffusers", *names)}
    best: dict[str, dict[str, float] | str] = {}
    for turn in range(1, rounds + 1):
        for name, side in sides.items():
            if turn == 1 or not isinstance(best[name], str):
                best[name] = _better(best.get(name), apart(side, steps, threads, venv))
                print(f"round {turn} of {rounds}: {name} {best[name]}", file=sys.stderr, flush=True)
            if isinstance(reference := best["diffusers"], str):
                raise SystemExit(f"diffusers: {reference}")
    assert isinstance(reference, dict)
    print(f"{threads} thread(s), best of {rounds} rounds of {steps} steps; cpu: processor seconds")
    print(f"{'':18}{'load s':>8}{'cpu':>7}{'step s':>9}{'cpu':>8}{'ratio':>7}{'cpu':>6}{'peak GB':>9}")
    for name, figures in best.items():
        if isinstance(figures, str):
            print(f"{name:18}not measured here: {figures}")
            continue
        wall = figures["step_seconds"] / reference["step_seconds"]
        processor = figures["step_processor_seconds"] / reference["step_processor_seconds"]
        print(
            f"{name:18}{figures['load_seconds']:8.1f}{figures['load_processor_seconds']:7.1f}"
            f"{figures['step_seconds']:9.2f}{figures['step_processor_seconds']:8.2f}{wall:7.2f}{processor:6.2f}"
            f"{figures['peak_gb']:9.2f}"
        )


def _better(before: dict[str, float] | str | None, now: dict[str, float] | str) -> dict[str, float] | str:
    if isinstance(before, dict) and isinstance(now, dict):
        return {key: (max if key == "peak_gb" else min)(before[key], value) for key, value in now.items()}
    return before if isinstance(before, dict) else now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("bench-out"))
    known = (*PACKAGES, *(name for name in OTHERS if name != "diffusers"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    openvino = Path(os.environ["OPENVINO"]) if "OPENVINO" in os.environ else None
    parser.add_argument("--openvino", type=Path, metavar="VENV", default=openvino)
    parser.add_argument("--steps", type=command_line.positive, default=3)
    parser.add_argument("--rounds", type=command_line.positive, default=2)
    parser.add_argument("--threads", type=command_line.positive, default=torch.get_num_threads())
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"unknown network {unknown[0]!r}: expected one of {', '.join(known)}")
    if given.openvino is not None:  # last, so that all else is ours
        sys.path += [str(path) for path in given.openvino.glob("lib/python*/site-packages")]
    if given.side is not None:
        print(json.dumps(measure(given.side, given.steps, given.threads)))
    else:
        show(given.folder, given.names or list(known), given.steps, given.threads, given.rounds, given.openvino)


if __name__ == "__main__":
    command_line.run(main)
