"""The torch backend beside diffusers: seconds to load, seconds per UNet step and peak memory, float32 on the CPU.

    python benchmarks/bench_torch.py FOLDER [NAME ...]

of the original package, the same at 6 bits, and split_einsum_v2, each made in FOLDER where it is missing. Each side
runs in a process of its own. On a shared machine compare processor seconds: their ratio hardly depends on what else
is running, which that of wall seconds does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from full_size import full_size_unet
from full_size_checkpoint import SD1_UNET

TOKENS = 77


def diffusers_step() -> Callable[[], object]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel.from_config(dict(SD1_UNET)).eval().requires_grad_(False)
    size, width = SD1_UNET["sample_size"], SD1_UNET["cross_attention_dim"]
    latents, states = torch.randn(2, SD1_UNET["in_channels"], size, size), torch.randn(2, TOKENS, width)

    def step() -> object:
        with torch.inference_mode():
            return network(latents, torch.full((2,), 981.0), states, return_dict=False)

    return step


def backend_step(package: Path) -> Callable[[], object]:
    import numpy as np

    from diffusion_runtime.backends.torch_mil import TorchBackend

    model = TorchBackend().load(package)
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(spec.shape).astype(spec.dtype) for name, spec in model.inputs.items()}
    return lambda: model(**arrays)


def measure(package: str, steps: int, threads: int) -> dict[str, float]:
    """Figures of one side: diffusers where ``package`` is empty. The first step, which warms up, does not count."""
    torch.set_num_threads(threads)
    started = time.perf_counter(), time.process_time()
    step = backend_step(Path(package)) if package else diffusers_step()
    loaded = time.perf_counter() - started[0], time.process_time() - started[1]
    step()
    wall, processor = [], []
    for _ in range(steps):
        begun = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - begun[0])
        processor.append(time.process_time() - begun[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "load_seconds": loaded[0],
        "load_processor_seconds": loaded[1],
        "step_seconds": min(wall),
        "step_processor_seconds": min(processor),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    }


def apart(package: str, steps: int, threads: int) -> dict[str, float]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--side", package, "--steps", str(steps), "--threads", str(threads)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, float] = json.loads(shown.strip().splitlines()[-1])
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


def main(folder: Path, names: list[str], steps: int, threads: int) -> None:
    reference = apart("", steps, threads)
    print(f"{threads} thread(s), best of {steps} steps; cpu: processor seconds")
    print(f"{'':18}{'load s':>8}{'cpu':>7}{'step s':>9}{'cpu':>8}{'ratio':>7}{'cpu':>6}{'peak GB':>9}")
    for name in ("diffusers", *names):
        figures = reference if name == "diffusers" else apart(str(PACKAGES[name](folder)), steps, threads)
        wall = figures["step_seconds"] / reference["step_seconds"]
        processor = figures["step_processor_seconds"] / reference["step_processor_seconds"]
        print(
            f"{name:18}{figures['load_seconds']:8.1f}{figures['load_processor_seconds']:7.1f}"
            f"{figures['step_seconds']:9.2f}{figures['step_processor_seconds']:8.2f}{wall:7.2f}{processor:6.2f}"
            f"{figures['peak_gb']:9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("bench-out"))
    parser.add_argument("names", nargs="*", choices=[*PACKAGES, []], default=[], metavar="NAME")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        print(json.dumps(measure(given.side, given.steps, given.threads)))
    else:
        main(given.folder, given.names or list(PACKAGES), given.steps, given.threads)
