"""``coreml-sd convert``: what the user typed becomes options; what was done becomes lines."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_convert.bundle.zip_names import PATTERN as ZIP_PATTERN
from diffusion_convert.cli.options import options, takes
from diffusion_convert.conversion.events import Event, Phase, Progress
from diffusion_convert.conversion.workspace import kept
from diffusion_runtime.cli import interruption
from diffusion_runtime.cli.console import INTERRUPTED
from diffusion_runtime.families import FAMILIES, Layout

if TYPE_CHECKING:
    from rich.console import Console

    from diffusion_convert.conversion.convert import Conversion

CONVERT_HELP = """
Convert a Stable Diffusion checkpoint to Core ML models, on any machine.

SOURCE is a folder in diffusers' layout, a single .safetensors, .ckpt or
.gguf file, or the id of a repository on the Hugging Face Hub. Every model is
verified against the checkpoint's own network before it appears.

A conversion that was stopped goes on where it stopped: run the same command
again. Components and variants are added to what the same source and options
have left in the folder; what others have left there is replaced.

Examples:

    coreml-sd convert stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        -o models

    coreml-sd convert model.safetensors -o models --target iOS17 \\
        --attention split_einsum_v2 --nbits 6

    coreml-sd convert my-checkpoint -o models --height 768 \\
        --width 512 --lora style.safetensors:0.8
"""


@takes(lambda _: True)
def convert(
    source: Annotated[
        str,
        typer.Argument(help="Folder, file or Hub id of the checkpoint.", metavar="SOURCE", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.", show_default=False)],
    **given: Any,
) -> None:
    wanted = options(given)
    from rich.console import Console

    from diffusion_convert.conversion.convert import convert as run

    console = Console(stderr=True)
    try:
        with interruption.seen(), _progress(console) as progress:
            made = run(source, output, wanted, progress)
    # Said here and not by `main`, which does not know the output: what is kept there is worth knowing.
    except KeyboardInterrupt:
        _say_kept(output)
        sys.exit(INTERRUPTED)
    _show(made)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar for what is done now, and a line for each component that is finished."""
    from rich import progress

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        said = {Phase.FAMILY: "family", Phase.NOTE: "note:", Phase.COMPILE: "compiling", Phase.ZIP: "zipping"}
        bar = bars.add_task("opening the checkpoint", total=1.0)
        part, since = "", time.perf_counter()

        def report(event: Event) -> None:
            nonlocal part, since
            interruption.check()
            if event.part != part:
                if part:
                    console.print(f"{part}: done in {time.perf_counter() - since:.0f} s", highlight=False)
                part, since = event.part, time.perf_counter()
            if event.phase in said:
                line = f"{said[event.phase]} {event.text}".strip()
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            bars.update(bar, description=f"{event.part} {event.phase}".strip(), completed=event.fraction)

        yield report


def _show(made: Conversion) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{made.output} ({made.family})")
    for column in ("variant", "component", "size", "weights", "PSNR against the checkpoint's network"):
        table.add_column(column)
    for variant, manifest in made.variants.items():
        for name, component in manifest.components.items():
            quality = f"{min(component.psnr_db.values()):.1f} dB" if component.psnr_db else "not verified"
            if component.psnr_db and component.palettization:
                quality += " against 16-bit weights"
            wide = f" ({len(component.float32_ops)} operations float32)" if component.float32_ops else ""
            size = f"{component.size_bytes / 1e6:.1f} MB"
            bits = f"{component.palettization.nbits:g} bits" if component.palettization else component.precision
            table.add_row(variant, name, size, bits + wide, quality)
    console.print(table)
    if made.unchanged:
        typer.echo(f"{made.output}: was complete already; nothing was done")
    for line in _what_next(made):
        typer.echo(line)


def _what_next(made: Conversion) -> Iterator[str]:
    """Where the result is, by kind, and the command that makes a picture of it, if it can."""
    from diffusion_runtime.tasks import starts_from

    folders = [made.output / name for name in made.variants]
    for kind in ("packages", "compiled"):
        if there := [str(folder / kind) for folder in folders if (folder / kind).is_dir()]:
            yield f"{kind}: {', '.join(there)}"
    if zips := sorted(str(path) for path in made.output.glob(ZIP_PATTERN)):
        yield f"zips: {', '.join(zips)}"
    parts = {name for variant in made.variants.values() for name in variant.components}
    layouts = {variant.layout for variant in made.variants.values()}
    if parts >= {"text_encoder", FAMILIES[made.family].denoiser.component, "vae_decoder"} and layouts == {
        Layout.APPLE
    }:
        needed = starts_from(FAMILIES[made.family].in_channels)
        pictures = "".join(f" --{name} {'photo' if name == 'image' else name}.png" for name in needed)
        models = shlex.quote(str(made.output))
        yield f'next: coreml-sd generate {models} --prompt "..."{pictures} -o picture.png'


def _say_kept(output: Path) -> None:

    names = kept(output)
    what = (
        f"{', '.join(names)} finished and kept; run the same command again to go on" if names else "nothing is kept"
    )
    typer.echo(f"interrupted: {what}", err=True)
