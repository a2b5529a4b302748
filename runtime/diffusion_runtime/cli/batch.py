"""`coreml-sd batch`: a table of prompts in, pictures and results.jsonl out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_runtime.cli import interruption, options
from diffusion_runtime.cli.console import INTERRUPTED, SECONDS_BETWEEN_LINES, error_console, progress_bar, say
from diffusion_runtime.cli.options import option

if TYPE_CHECKING:
    from diffusion_runtime.batch.run import Batch

FAILED = 1
HELP = """
Make many pictures from a table of prompts.

PROMPTS is a .txt with one prompt per line, or a .jsonl, .csv or .parquet with a
column "prompt" and, where wanted, others: negative_prompt, seed, steps,
guidance_scale, scheduler, eta, rng, strength, noise_level, count, and image, mask
and depth_image, which name files beside PROMPTS (or hold them in base64).

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


def batch(
    models: Annotated[Path, typer.Argument(help="Folder of models.", metavar="MODELS", show_default=False)],
    prompts: Annotated[Path, typer.Argument(help="Table of prompts.", metavar="PROMPTS", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder, or a URI of object storage.", show_default=False)
    ],
    negative_prompt: Annotated[str | None, option("What not to draw.")] = None,
    steps: Annotated[
        int | None, option("Denoising steps. Default: diffusers' for these models, mostly 50.")
    ] = None,
    guidance_scale: Annotated[
        float | None, option("How closely to follow the prompt. Default: the models'.")
    ] = None,
    scheduler: Annotated[str | None, option("As for generate. Default: the checkpoint's.")] = None,
    eta: Annotated[float | None, option("As for generate. Default: 0.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture of the table; they count up.")] = 0,
    rng: Annotated[str | None, option("torch, numpy or nvidia. Default: torch.")] = None,
    strength: Annotated[float | None, option("For rows with a picture. Default: 0.8; 1 with a mask.")] = None,
    count: Annotated[int, typer.Option(help="Pictures per row.", min=1)] = 1,
    workers: Annotated[
        int | None, option("Processes, each with its own models. Default: 1, or one for each unit or device.")
    ] = None,
    threads: options.WorkerThreads = None,
    ray: Annotated[
        str | None,
        option("Workers on a Ray cluster: local, auto or its address. Default workers: its CPUs by --threads."),
    ] = None,
    backend: options.Backend = "auto",
    compute_units: options.EachUnit = None,
    device: options.EachDevice = None,
    dtype: options.Dtype = None,
    reduce_memory: options.ReduceMemory = False,
    tokenizer: options.Tokenizer = None,
    safety: options.Safety = True,
    ignore: options.Ignored = None,
    redo: Annotated[bool, option("Replace pictures that other rows, options or models made.", "--redo")] = False,
) -> None:
    from diffusion_runtime.batch import on_ray, places
    from diffusion_runtime.batch import run as batches
    from diffusion_runtime.batch.local import LocalWorkers

    defaults = options.given(
        negative_prompt=negative_prompt, steps=steps, guidance_scale=guidance_scale, scheduler=scheduler, eta=eta
    ) | options.given(seed=seed, rng=rng, strength=strength)
    loading = options.given(
        backend=backend, dtype=dtype, reduce_memory=reduce_memory, tokenizer=tokenizer, check_safety=safety
    )
    each = threads or batches.default_threads()
    cluster = None if ray is None else on_ray.connect(ray)
    if cluster is not None and workers is None and not (compute_units or device):
        workers = max(1, on_ray.cores(cluster) // each)
    setups = batches.setups(
        str(models.absolute()), loading, _absolute(output), each, workers, compute_units, device
    )
    place = places.open_place(_absolute(output))
    with place.hold():
        plan = batches.prepare(prompts, place, defaults, count, setups, set(ignore or ()), redo)
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
