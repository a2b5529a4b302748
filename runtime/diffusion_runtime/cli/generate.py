"""`coreml-sd generate`: options in, pictures and lines out."""

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
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import Progress

    from diffusion_runtime.denoising import Step
    from diffusion_runtime.generation import Made, OnStep, Order
    from diffusion_runtime.stages import Run

GENERATE_HELP = """
Make pictures with converted models.

MODELS is the folder that `convert` wrote (the best variant in it is chosen,
and named), a variant in it such as models/original/packages, or a folder of
models that Apple's tools made.

What is done follows from the models and from what you give:

* [bold]text to image[/bold]: a prompt.

* [bold]image to image[/bold]: --image, and --strength for how much may change.

* [bold]in-painting[/bold]: --image and --mask; white is painted anew. In-painting
checkpoints see the surroundings, any other blends.

* [bold]depth to image[/bold]: --image, whose depth is kept; it is estimated, or given
by --depth-image. Models of a depth checkpoint.

* [bold]editing[/bold]: --image, and a prompt that says what to change. Models of an
InstructPix2Pix checkpoint; --image-guidance-scale says how closely to follow the image.

* [bold]ControlNets[/bold], with any of the above: --control NAME=PICTURE, as many as you
like; its NAME is that in the models' folder, or a part of it that says which.
PICTURE has the size of the result and is what the ControlNet takes (edges,
depth, …), or any picture with --prepare canny (or depth, inpaint, tile).

* [bold]T2I-Adapters and IP-Adapters[/bold], with any of the above, where the models were
converted with them: --adapter NAME=PICTURE and --ip-adapter-image PICTURE.

* [bold]upscaling[/bold]: --image, a quarter of the result's size, and --noise-level.
Models of the x4 upscaler.

All that take an image need vae_encoder, except upscaling.

"(word:1.3)" in a prompt draws more attention to word, "(word:0.7)" less; any
other bracket is just text.

Examples:

    coreml-sd generate models --prompt "a red circle" -o circle.png

    coreml-sd generate models --prompt "a watercolour" -o painted.png \\
        --image photo.jpg --strength 0.6

    coreml-sd generate models --prompts-file prompts.txt --count 4 \\
        --seed 1 -o out/picture.png

    coreml-sd generate models --prompt "a house" -o house.png \\
        --control canny=photo.jpg:0.8 --prepare canny

    coreml-sd generate --from circle.png -o again.png
"""


@takes(options.PICTURE, options.LOADING)
def generate(
    models: Annotated[Path | None, typer.Argument(help="Folder of models.", show_default=False)] = None,
    output: Annotated[
        Path | None, option("PNG to write; several become NAME-1.png, NAME-2.png, …", "--output", "-o")
    ] = None,
    *,
    prompts_file: Annotated[Path | None, option("Text file with one prompt per line, instead of --prompt.")] = None,
    count: Annotated[int, typer.Option(help="Pictures per prompt, with seeds counting up.")] = 1,
    control: Annotated[
        list[str] | None,
        option(
            "Steer by a ControlNet: NAME=PICTURE:SCALE:START:END, as canny=edges.png:0.8; the numbers "
            "may be left out. Several at once."
        ),
    ] = None,
    prepare: Annotated[
        list[str] | None,
        option(
            "Make a control's picture of the one given: canny, depth, inpaint or tile; NAME=canny is for that one.",
            "--prepare",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        option(
            "Steer by a T2I-Adapter: NAME=PICTURE:SCALE:FACTOR, FACTOR the part of the steps; the numbers "
            "may be left out. Several at once."
        ),
    ] = None,
    ip_adapter_image: Annotated[
        list[str] | None,
        option(
            "Draw after a picture, by an IP-Adapter: PICTURE, PICTURE:SCALE or NAME=PICTURE:SCALE; one for "
            "each adapter, or several for one that was converted for them."
        ),
    ] = None,
    clip_skip: Annotated[
        int | None, option("Part of the models: refused unless they were converted with the same.")
    ] = None,
    preview: Annotated[
        bool, option("Keep NAME-preview.png up to date while working, checked as pictures are.", "--preview")
    ] = False,
    from_picture: Annotated[
        Path | None, option("Repeat a picture that was made here; other options override.", "--from")
    ] = None,
    **given: Any,
) -> None:
    from diffusion_runtime import control as controls
    from diffusion_runtime import generation, picture_prompts, t2i_adapters

    settings = options.chosen(given, options.PICTURE)
    if control or prepare:
        settings["controls"] = controls.prepared(map(controls.parse, control or ()), prepare or ())
    if adapter:
        settings["adapters"] = tuple(map(t2i_adapters.parse, adapter))
    if ip_adapter_image:
        settings["ip_adapter_images"] = tuple(map(picture_prompts.parse, ip_adapter_image))
    order = generation.order(
        models,
        settings,
        loading=options.chosen(given, options.LOADING),
        from_picture=from_picture,
        prompts_file=prompts_file,
        count=count,
        output=output,
        preview=preview,
    )
    done: list[Made] = []
    try:
        with interruption.seen():
            _make(order, done, clip_skip)
    except KeyboardInterrupt:
        say(error_console(), f"interrupted: {len(done)} of {len(order.planned)} pictures are finished")
        sys.exit(INTERRUPTED)


def _make(order: Order, done: list[Made], clip_skip: int | None) -> None:
    """Make the pictures; ``done`` is told of each."""
    from diffusion_runtime import generation
    from diffusion_runtime.loading import load_pipeline

    console = error_console()
    with console.status("loading models"):
        pipeline = load_pipeline(order.models, **order.loading)
    pipeline.check_clip_skip(clip_skip)
    told: set[str] = set()
    with progress_bar(console) as progress:
        on_step = _reporter(progress, len(order.planned), pipeline.notes)
        for made in generation.make(pipeline, order, on_step):
            for note in made.notes:
                if note not in told:
                    say(console, note)
            told.update(made.notes)
            _report(console, made)
            done.append(made)
    for name, timing in pipeline.models.timings.items():
        console.print(
            f"{name:<16} loaded in {timing.load_seconds:.2f} s, first call {timing.first_call_seconds:.2f} s, "
            f"then {timing.steady_seconds:.3f} s each ({timing.calls} calls)",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )


def _report(console: Console, made: Made) -> None:
    if made.flagged:
        say(
            console,
            f"{made.path}: the safety checker flagged this picture, so it is black; try another seed or prompt",
        )
    typer.echo(f"{made.path}  seed {made.settings.seed}")


def _reporter(progress: Progress, pictures: int, notes: Sequence[str]) -> OnStep:
    """Shows each step; where no terminal can, as in a log, a line now and then. ``notes`` come with the first: an
    order that is refused is answered by one line."""
    task = progress.add_task("denoising", total=None)
    console, said = progress.console, time.monotonic()

    def on_step(first: int, step: Step, run: Run) -> None:
        nonlocal said
        interruption.check()
        last = first + run.job.request.pictures
        which = f"{first + 1}" if last == first + 1 else f"{first + 1}-{last}"
        label = "denoising" if pictures == 1 else f"picture {which} of {pictures}"
        for note in notes if (first, step.index) == (0, 0) else ():
            say(console, note)
        if step.index == 0:
            progress.reset(task, total=step.total, description=label)
        progress.update(task, completed=step.index + 1, description=label)
        if not console.is_terminal and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            console.print(f"{label}: step {step.index + 1} of {step.total}", highlight=False, soft_wrap=True)

    return on_step


def register(app: typer.Typer) -> None:
    app.command(help=GENERATE_HELP)(generate)
