"""Seconds and peak memory of converting a full-size checkpoint with random weights, by phase.

    python benchmarks/bench_convert.py [--family sd1|sdxl] [--folder DIR] [--attention KIND ...] [--whole]
    python benchmarks/bench_convert.py --component unet --nbits 6 --size 512x512 --size 768x512

For each attention, the UNet (Stable Diffusion 1.5: 859.5 M parameters at 512x512; XL: 2,567 M at 1024x1024; batch
2) is converted and verified in its own process. ``--whole`` converts all components in both variants instead, of XL
in its default one, as a user would; ``--component`` only those; ``--size`` for these sizes. Processor seconds are
printed as well as seconds: they can be compared on a machine that does other things, too. A phase's peak is all
memory in use, pages of mapped files included, which the system may take back; ``--limit-gb`` refuses the process
more memory of its own than that (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import command_line
from diffusion_convert.conversion.events import Event
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.families import COMPONENTS, AttentionKind
from diffusion_runtime.processes import peak_memory
from full_size_checkpoint import FAMILIES, write_checkpoint

WHOLE = {"sd1": "original,split_einsum_v2", "sdxl": "original"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/coreml-sd-bench"))  # noqa: S108
    parser.add_argument("--attention", action="append", choices=[kind.value for kind in AttentionKind])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--component", action="append", default=[], choices=COMPONENTS)
    parser.add_argument("--size", action="append", default=[], metavar="WIDTHxHEIGHT")
    parser.add_argument("--nbits", type=int)
    parser.add_argument("--compiled", action="store_true", help="compiled models, too")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--limit-gb", type=float)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkpoint = arguments.folder / f"checkpoint-{arguments.family}"
    if arguments.child:
        convert(checkpoint, arguments.child.split(","), arguments)
        return
    options_of([], arguments)  # what is wrong with them is said before a checkpoint is written
    print(f"checkpoint: {write_checkpoint(checkpoint, arguments.family)}", flush=True)
    kinds = arguments.attention or [kind.value for kind in AttentionKind]
    if arguments.whole or arguments.component:
        kinds = [",".join(arguments.attention or [WHOLE[arguments.family]])]
    for chosen in kinds:
        subprocess.run([sys.executable, *sys.argv, "--child", chosen], check=True)


def convert(checkpoint: Path, kinds: list[str], arguments: argparse.Namespace) -> None:
    """Convert, and print what each phase took and the most memory in use in it."""
    import diffusion_convert

    if arguments.limit_gb:
        limit = int(arguments.limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    options = options_of(kinds, arguments)
    what = ", ".join([*options.components, *map(str, options.sizes)]) or "whole checkpoint"
    output = arguments.folder / f"models-{arguments.family}-{'-'.join([*options.components, *kinds])}"
    shutil.rmtree(output, ignore_errors=True)
    phases = Phases()
    diffusion_convert.convert(checkpoint, output, options, phases)
    phases.switch("")
    share = sum(seconds for name, seconds in phases.processor.items() if name.endswith(" convert"))
    print(
        f"{arguments.family} {what} {', '.join(kinds)}: {sum(phases.seconds.values()):.1f} s, "
        f"{sum(phases.processor.values()):.1f} s processor on {os.cpu_count()} cores, "
        f"{max(phases.peaks_gb):.2f} GB peak; "
        f"in ct.convert {share / sum(phases.processor.values()):.0%} of the processor's time",
        flush=True,
    )
    shutil.rmtree(output)


def options_of(kinds: list[str], arguments: argparse.Namespace) -> ConvertOptions:
    return ConvertOptions(
        attention=tuple(AttentionKind(kind) for kind in kinds),
        components=tuple(arguments.component) or (() if arguments.whole else ("unet",)),
        nbits=arguments.nbits,
        sizes=tuple(arguments.size),
        compiled=arguments.compiled,
        verify=not arguments.no_verify,
    )


class Phases:
    """Listens to a conversion and prints each phase as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.peaks_gb = [0.0]
        self._name, self._since, self._processor_since = "start", time.perf_counter(), processor_seconds()

    def __call__(self, event: Event) -> None:
        self.switch(f"{event.part} {event.phase}".strip())

    def switch(self, name: str) -> None:
        if name == self._name:
            return
        now, processor = time.perf_counter(), processor_seconds()
        self.seconds[self._name] = now - self._since
        self.processor[self._name] = processor - self._processor_since
        self.peaks_gb.append(take_peak_gb())
        print(
            f"  {self._name:<40}{now - self._since:8.1f} s {processor - self._processor_since:8.1f} s processor "
            f"{self.peaks_gb[-1]:6.2f} GB peak",
            flush=True,
        )
        self._name, self._since, self._processor_since = name, now, processor


def processor_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def take_peak_gb() -> float:
    """The most memory that this process has had at once, files that it has mapped included, since the last call (on
    Linux; elsewhere, since it began)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory() / 1e9
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: man 5 proc
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    command_line.run(main)
