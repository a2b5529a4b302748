"""``coreml-sd verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_convert.cli.options import options, takes

if TYPE_CHECKING:
    from diffusion_convert.checkpoint.model import Checkpoint


@takes(lambda option: option.opening, "As at conversion")
def verify(
    models: Annotated[
        Path, typer.Argument(help="A folder that `convert` wrote, or one of the folders of models in it.")
    ],
    against: Annotated[str, typer.Option(help="The checkpoint that they were converted from.", metavar="SOURCE")],
    **given: Any,
) -> None:
    """Compare every component, packages and compiled, with the source's own networks. Exit code 1: one differs."""
    from diffusion_convert.checkpoint.open import open_checkpoint

    wanted = options(given)
    checkpoint = open_checkpoint(against, wanted)
    failed = _compare(models, checkpoint)
    if failed:
        advice = _advice({"--vae": wanted.vae, "--lora": wanted.loras, "--embedding": wanted.embeddings})
        typer.echo(f"error: {models}: differs from {against}: {', '.join(failed)}; {advice}", err=True)
        raise typer.Exit(1)


def _compare(models: Path, checkpoint: Checkpoint) -> list[str]:
    """Print a line for each comparison; folder and component of those that differ."""
    from diffusion_convert.verification.folder import verify_models

    rows = [("models", "component", "worst output", "PSNR", "at least", "")]
    for comparison in verify_models(models, checkpoint, lambda text: typer.echo(text, err=True)):
        output, value = min(comparison.psnr_db.items(), key=lambda item: item[1])
        verdict = "ok" if comparison.holds else "FAILED"
        figures = (f"{value:.1f} dB", f"{comparison.bound_db:.1f} dB")
        rows.append((comparison.folder, comparison.component, output, *figures, verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return [f"{folder} {component}" for folder, component, *_, verdict in rows if verdict == "FAILED"]


def _advice(asked: Mapping[str, object]) -> str:
    missing = [option for option, given in asked.items() if not given]
    given = f" (was it converted with {' or '.join(missing)}? then name it here too)" if missing else ""
    return f"convert it again{given}"
