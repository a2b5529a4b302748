"""How many pictures of the shapes checkpoint are right in few steps, with the LoRA that was distilled for that:
converts both together, draws every caption with the torch backend and judges the pictures.

    python benchmarks/bench_few_steps.py [--folder FOLDER] [--every 1] [--steps 1 2 4 8]

prints a Markdown table. ``--every 5`` takes a fifth of the captions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import command_line
from bench_palettized_quality import CHECKPOINT, ROOT, judged

LORA = ROOT / "tests" / "checkpoints" / "shapes-lcm"
SCHEDULER, GUIDANCE = "lcm", 1.0


def converted(folder: Path, nbits: int | None) -> Path:
    """The packages with the LoRA fused, made once."""
    from diffusion_convert import ConvertOptions, convert

    options = ConvertOptions(
        attention="original",
        loras=str(LORA),
        nbits=nbits,
        batch_size=1,
        target="macOS15",
        compiled=False,
        zip=False,
    )
    convert(CHECKPOINT, folder, options)
    return folder / "original" / "packages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-out") / "few-steps")
    parser.add_argument("--every", type=command_line.positive, default=1)
    parser.add_argument("--steps", type=command_line.positive, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    print("| weights | LCM steps | pictures right | seconds |\n|---|---|---|---|")
    for nbits in (None, 6):
        packages = converted(arguments.folder / f"models-{nbits or 16}", nbits)
        for steps in arguments.steps:
            found = judged(packages, arguments.every, steps=steps, guidance=GUIDANCE, scheduler=SCHEDULER)
            share = 100 * found["right"] / found["of"]
            right = f"{found['right']} of {found['of']} = {share:.1f} %"
            print(f"| {nbits or 16} bits | {steps} | {right} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    command_line.run(main)
