"""`coreml-sd evaluate`: guidance scales against CLIP score and distance."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_runtime import atomic
from diffusion_runtime.cli import interruption, options
from diffusion_runtime.cli.console import INTERRUPTED, error_console, progress_bar, say
from diffusion_runtime.cli.options import option, takes
from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    from diffusion_runtime.batch.worker import Setup
    from diffusion_runtime.evaluate.measure import Measurement
    from diffusion_runtime.evaluate.sweep import Sweep

NEEDED = ("matplotlib", "torchmetrics")
HELP = """
Measure models over guidance scales, as the model cards do.

Every MODELS draws the same prompts with the same seeds at each scale of
--guidance, as batch does. Give --reference-images, pictures of what the
prompts say, or a second MODELS: the first is the reference then. For each
MODELS and scale there are

* the CLIP score: how well pictures fit their prompts (up to 100)

* the Fréchet distance and KID with its 95 % interval, from the reference,
and their floors: what the reference's halves are from each other

* PSNR and the number of equal pictures, compared with the first MODELS

* flagged pictures, which are in no other number

in table.csv and table.json, and distance against CLIP score in plot.png.
A distance needs thousands of pictures; with few, compare it with its floor.

Examples:

    coreml-sd evaluate models --prompts captions.csv -o out \\
        --reference-images photos

    coreml-sd evaluate fp16=a 6-bit=b 4-bit=c --prompts captions.txt -o out \\
        --guidance 3,7.5 --steps 25

    coreml-sd evaluate models --prompts p.txt -o out \\
        --reference-images photos --clip ./clip-base --features clip

Run the same command again after an interruption: it goes on where it stopped.
"""

SIZE = ("height", "width")


@takes({name: options.PICTURE[name] for name in SIZE}, options.BACKEND, options.WORKERS)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders of models; NAME=FOLDER names one.", metavar="MODELS...", show_default=False),
    ],
    prompts: Annotated[
        Path, typer.Option(help="Table of prompts, as for batch: .txt, .jsonl, .csv, .parquet.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.", show_default=False)],
    guidance: Annotated[str, typer.Option(help="Guidance scales.")] = "1.5,2,3,4,5,6,7,8",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 50,
    scheduler: Annotated[str, typer.Option(help="As for generate.")] = "pndm",
    reference_images: Annotated[Path | None, option("Folder of pictures that distances are taken from.")] = None,
    clip: Annotated[
        str, typer.Option(help="CLIP: a Hub id or a folder, with safetensors.")
    ] = "openai/clip-vit-large-patch14",
    features: Annotated[
        str,
        typer.Option(
            help="Of distances: inception, clip (that of --clip), or a Hub id or folder, with safetensors."
        ),
    ] = "inception",
    seed: Annotated[int, typer.Option(help="Of the first prompt; they count up.")] = 0,
    **given: Any,
) -> None:
    options.check_installed("evaluate", NEEDED, "evaluate")
    from diffusion_runtime.batch import run as batches
    from diffusion_runtime.evaluate import report, sweep

    if reference_images is None and len(models) == 1:
        raise InputError("nothing to take distances from: give --reference-images DIR or a second MODELS")
    ignored = set(given["ignore"] or ())
    loading = options.chosen(given, options.BACKEND)
    each = batches.default_threads() if given["threads"] is None else given["threads"]

    def setups(folder: str, place: str) -> list[Setup]:
        kinds = given["workers"], given["compute_units"], given["device"]
        return batches.setups(folder, loading, place, each, *kinds)

    chosen = {"steps": steps, "scheduler": scheduler, "seed": seed, **options.chosen(given, SIZE)}
    what = sweep.Sweep(
        sweep.name_models(models), prompts, sweep.parse_scales(guidance), output, chosen, setups, ignored
    )
    texts = sweep.read_prompts(prompts, ignored)
    atomic.check_writable(output)
    measurement = _measurement(what, texts, clip, features, reference_images)
    with atomic.locked(output):
        _draw(what, bool(given["redo"]))
        rows = _measured(measurement)
        notes = measurement.notes(rows)
        reference = next(iter(what.models)) if reference_images is None else str(reference_images)
        about = {"prompts": str(prompts), **chosen, "clip": clip, "features": features, "reference": reference}
        written = report.write(output, rows, {**about, "safety": given["check_safety"], "notes": notes})
    for note in notes:
        say(error_console(), note)
    _show(rows)
    typer.echo(f"{output}: {', '.join(written)}")


def _measurement(
    what: Sweep, texts: Sequence[str], clip: str, features: str, reference_images: Path | None
) -> Measurement:
    """The networks that look at pictures, loaded, and what they make of the reference."""
    from diffusion_runtime.evaluate import measure, networks

    seeing = networks.load_clip(clip)
    measurement = measure.Measurement(what, seeing, networks.load_features(features, seeing))
    if reference_images is not None:
        measurement.reference = measure.look_at(reference_images, measurement.features)
    if cut := seeing.too_long(texts):
        said = f"{cut} prompts are longer than CLIP reads: their ends do not count in the CLIP score"
        say(error_console(), said)
    return measurement


def _draw(what: Sweep, redo: bool) -> None:
    """Make the pictures that are not there, with progress."""
    from diffusion_runtime.evaluate.sweep import check_done

    console, made = error_console(), 0
    sets = [(name, scale) for name in what.models for scale in what.scales]
    try:
        with interruption.seen(), progress_bar(console) as progress:
            for index, (name, scale) in enumerate(sets, 1):
                with what.holding(name, scale):
                    batch = what.batch(name, scale, redo)
                    total = sum(task.count for task in batch.plan.to_make)
                    text = f"{name}, guidance {scale:g} ({index} of {len(sets)})"
                    if total and not console.is_terminal:
                        console.print(f"{text}: {total} pictures", highlight=False, soft_wrap=True)
                    shown = progress.add_task(text, total=total)
                    for answer in batch.run():
                        interruption.check()
                        made += answer.task.count
                        progress.advance(shown, answer.task.count)
                    progress.remove_task(shown)
                check_done(batch, what.prompts)
    except KeyboardInterrupt:
        say(console, f"interrupted: {made} pictures were made now; the same command goes on with the rest")
        sys.exit(INTERRUPTED)


def _measured(measurement: Measurement) -> list[Any]:
    """The rows, those of one set of models together."""
    names = list(measurement.sweep.models)
    with progress_bar(error_console()) as progress:
        shown = progress.add_task("measured", total=len(names) * len(measurement.sweep.scales))
        rows = []
        for row in measurement.rows():
            rows.append(row)
            progress.advance(shown)
    return sorted(rows, key=lambda row: (names.index(row.models), row.guidance_scale))


_SHOWN: Mapping[str, str] = {
    "models": "models",
    "guidance_scale": "guidance",
    "pictures": "pictures",
    "flagged": "flagged",
    "clip_score": "CLIP",
    "frechet_distance": "Fréchet",
    "frechet_floor": "floor",
    "kid": "KID",
    "kid_floor": "floor",
    "psnr_db": "PSNR dB",
}


def _show(rows: list[Any]) -> None:
    table = [list(_SHOWN.values()), *([_cell(getattr(row, name)) for name in _SHOWN] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def register(app: typer.Typer) -> None:
    app.command(help=HELP)(evaluate)
