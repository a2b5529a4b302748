"""How many pictures of the shapes checkpoint are right at each bit width: converts it, palettizes text encoder and
UNet, draws every caption with the torch backend and judges the pictures.

    python benchmarks/bench_palettized_quality.py [--folder FOLDER] [--every 1] [--only 6 mixed-4.5]

prints a Markdown table. ``--every 5`` takes a fifth of the captions. A variant's result is kept in FOLDER and not
made again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import command_line

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests" / "checkpoints" / "shapes"
PALETTIZED = ("text_encoder", "unet")
VARIANTS = ("float16", "8", "6", "4", "2", "mixed-4.5")
STEPS = 25
GUIDANCE = 7.5
FIRST_SEED = 1000  # as in quality_shapes.py


def converted(folder: Path) -> Path:
    """The float16 packages, made once."""
    from diffusion_convert import convert
    from diffusion_convert.options import ConvertOptions
    from diffusion_runtime.families import AttentionKind

    options = ConvertOptions(attention=(AttentionKind.ORIGINAL,), target="macOS15", compiled=False, zip=False)
    convert(CHECKPOINT, folder, options)
    return folder / "original" / "packages"


def variant(packages: Path, name: str, folder: Path) -> Path:
    """A copy of ``packages`` with the default components palettized as ``name`` says."""
    from diffusion_runtime.bundle import manifest

    if name == "float16":
        return packages
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(packages, folder)
    described = manifest.read(packages)
    for component in PALETTIZED:
        for file in described.components[component].files:
            _palettize(packages / file, folder / file, name)
    return folder


def _palettize(source: Path, output: Path, name: str) -> None:
    from diffusion_convert.palettize.checked import palettize_checked
    from diffusion_convert.palettize.damage import measure_damage
    from diffusion_convert.palettize.palettize_options import PalettizeOptions, widths_for
    from diffusion_convert.palettize.recipe import choose_bits
    from diffusion_runtime.mil.package import open_package

    if name.startswith("mixed-"):
        target = float(name.removeprefix("mixed-"))
        widths = widths_for(open_package(source))
        plan = PalettizeOptions(
            bits_by_weight=choose_bits(measure_damage(source, PalettizeOptions(), widths), target, widths)
        )
    else:
        plan = PalettizeOptions(int(name))
    shutil.rmtree(output)
    checked = palettize_checked(source, output, plan, bounds={1: 0.0})
    print(f"{name} {source.name}: {dict(checked.psnr_db)} dB", file=sys.stderr)


def judged(
    packages: Path, every: int, steps: int = STEPS, guidance: float = GUIDANCE, scheduler: str | None = None
) -> dict[str, Any]:
    """Draw captions and judge the pictures: how many are right, of how many, and the size of the weights."""
    sys.path.insert(0, str(ROOT / "tools"))
    judging: Any = __import__("judge_shapes")
    from diffusion_runtime import load_pipeline
    from diffusion_runtime.bundle import manifest

    pipeline = load_pipeline(packages, backend="torch", scheduler=scheduler, check_safety=False)
    chosen = list(enumerate(judging.captions()))[::every]
    began = time.perf_counter()
    right = 0
    for index, caption in chosen:
        made = pipeline(caption.text, seed=FIRST_SEED + index, num_inference_steps=steps, guidance_scale=guidance)
        right += judging.judge(made.images[0]).shows(caption)
    files = [packages / file for name in PALETTIZED for file in manifest.read(packages).components[name].files]
    size = sum(path.stat().st_size for file in files for path in file.rglob("weight.bin"))
    return {"right": right, "of": len(chosen), "bytes": size, "seconds": time.perf_counter() - began}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| text encoder and UNet | weights, MB | pictures right |", "|---|---|---|"]
    for name, found in results.items():
        share = 100 * found["right"] / found["of"]
        bits = name if name == "float16" else f"{name.removeprefix('mixed-')} bits{', mixed' * ('mixed' in name)}"
        lines.append(f"| {bits} | {found['bytes'] / 1e6:.2f} | {found['right']} of {found['of']} = {share:.1f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-out") / "palettized-quality")
    parser.add_argument("--every", type=command_line.positive, default=1)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    arguments = parser.parse_args()
    packages = converted(arguments.folder / "models")
    results = {}
    for name in arguments.only:
        kept = arguments.folder / f"{name}-every-{arguments.every}.json"
        if not kept.exists():
            found = judged(variant(packages, name, arguments.folder / name), arguments.every)
            kept.write_text(json.dumps(found))
        results[name] = json.loads(kept.read_text())
        print(f"{name}: {results[name]}", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    command_line.run(main)
