"""`coreml-sd batch`: a table of prompts in, pictures and results.jsonl out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_runtime.cli import interruption, options
from diffusion_runtime.cli.console import INTERRUPTED, SECONDS_BETWEEN_LINES, error_console, progress_bar, say
from diffusion_runtime.cli.options import option, takes

if TYPE_CHECKING:
    from diffusion_runtime.batch.run import Batch

FAILED = 1
HELP = """
Make many pictures from a table of prompts.

PROMPTS is a .txt with one prompt per line, or a .jsonl, .csv or .parquet with a
column "prompt" and, where wanted, others: negative_prompt, seed, steps,
guidance_scale, scheduler, eta, rng, strength, noise_level, height, width, count
and image, mask and depth_image, which name files beside PROMPTS (or hold them
in base64).

Pictures and results.jsonl (row, input, file, seed, seconds, flagged, error) go to
the output folder. Run the same command again after an interruption, or with more
rows: it goes on where it stopped. A row that fails is recorded and the rest goes
on; the exit code is 1 then.

Examples:

    coreml-sd batch models prompts.txt -o out

    coreml-sd batch models prompts.csv -o out --workers 2 --steps 25

    coreml-sd batch models prompts.jsonl -o out \\
        --compute-units cpu-and-ne,cpu-and-gpu

    coreml-sd batch models prompts.parquet -o s3://bucket/out --ray auto

Rows without a seed count up from --seed. The pictures do not depend on the number
of workers; the last bits do on --threads and on the kind of processor.
"""


SETTINGS = ("negative_prompt", "steps", "guidance_scale", "scheduler", "eta", "rng", "strength", "height", "width")
"""Of generate's options, those that are for rows that do not say them."""


@takes({name: options.PICTURE[name] for name in SETTINGS}, options.BACKEND, options.MEMORY, options.WORKERS)
def batch(
    models: Annotated[Path, typer.Argument(help="Folder of models.", metavar="MODELS", show_default=False)],
    prompts: Annotated[Path, typer.Argument(help="Table of prompts.", metavar="PROMPTS", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder, or a URI of object storage.", show_default=False)
    ],
    *,
    seed: Annotated[int, typer.Option(help="Of the first picture of the table; they count up.")] = 0,
    count: Annotated[int, typer.Option(help="Pictures per row.", min=1)] = 1,
    ray: Annotated[
        str | None,
        option("Workers on a Ray cluster: local, auto or its address. Default workers: its CPUs by --threads."),
    ] = None,
    **given: Any,
) -> None:
    from diffusion_runtime.batch import on_ray, places
    from diffusion_runtime.batch import run as batches
    from diffusion_runtime.batch.local import LocalWorkers

    loading = options.chosen(given, (*options.BACKEND, *options.MEMORY))
    workers, units, device = given["workers"], given["compute_units"], given["device"]
    each = given["threads"] or batches.default_threads()
    cluster = None if ray is None else on_ray.connect(ray)
    if cluster is not None and workers is None and not (units or device):
        workers = max(1, on_ray.cores(cluster) // each)
    setups = batches.setups(str(models.absolute()), loading, _absolute(output), each, workers, units, device)
    place = places.open_place(_absolute(output))
    defaults = {**options.chosen(given, SETTINGS), "seed": seed}
    with place.hold():
        ignored = set(given["ignore"] or ())
        plan = batches.prepare(prompts, place, defaults, count, setups, ignored, bool(given["redo"]))
        made_by = LocalWorkers(setups) if cluster is None else on_ray.RayWorkers(cluster, setups)
        _run(batches.Batch(plan, place, made_by), output)


def _run(batch: Batch, output: str) -> None:
    console, plan = error_console(), batch.plan
    total = sum(task.count for task in plan.to_make)
    if plan.done:
        say(console, f"{len(plan.done)} pictures are there already; {total} to make")
    for line in plan.failed:
        say(console, f"row {line['row']}: {line['error']}")
    try:
        with interruption.seen():
            _show(batch, total)
    except KeyboardInterrupt:
        made = sum(len(answer.flagged) for answer in batch.answers)
        say(
            console, f"interrupted: {made} of {total} pictures are finished; the same command goes on with the rest"
        )
        sys.exit(INTERRUPTED)
    typer.echo(
        f"{output}: {len(plan.done) + sum(len(answer.flagged) for answer in batch.answers)} pictures, results.jsonl"
    )
    if batch.failed:
        say(
            console,
            f"{batch.failed} rows failed: see the errors in {output}/results.jsonl; run it again to retry them",
        )
        raise typer.Exit(FAILED)


def _show(batch: Batch, total: int) -> None:
    """Make the pictures, with progress and an estimate; where there is no terminal, a line now and then."""
    console, started = error_console(), time.monotonic()
    said, made = started, 0
    with progress_bar(console) as progress:
        shown = progress.add_task("pictures", total=total)
        for answer in batch.run():
            interruption.check()
            made += answer.task.count
            progress.update(shown, completed=made)
            if answer.error is not None:
                say(console, f"row {answer.task.number}: {answer.error}")
            now = time.monotonic()
            if not console.is_terminal and now - said >= SECONDS_BETWEEN_LINES:
                said, left = now, (now - started) / made * (total - made)
                console.print(
                    f"{made} of {total} pictures, about {left:.0f} s left", highlight=False, soft_wrap=True
                )


def _absolute(output: str) -> str:
    """Workers may have another working folder."""
    return output if "://" in output else str(Path(output).absolute())


def register(app: typer.Typer) -> None:
    app.command(help=HELP)(batch)
