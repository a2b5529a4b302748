"""``coreml-diffusion verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion_runtime.errors import VerificationError


def verify(
    models: Annotated[
        Path, typer.Argument(help="A folder that `convert` wrote, or one of the folders of models in it.")
    ],
    against: Annotated[str, typer.Option(help="The checkpoint that they were converted from.", metavar="SOURCE")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    family: Annotated[str | None, typer.Option(help="The checkpoint's family, where it cannot be told.")] = None,
    vae: Annotated[str | None, typer.Option(help="The VAE that was put in at conversion.")] = None,
) -> None:
    """Compare every component, packages and compiled, with the source's own networks."""
    from diffusion_convert.checkpoint import open_checkpoint
    from diffusion_convert.parity import verify_models

    checkpoint = open_checkpoint(against, revision=revision, family=family, vae=vae)
    failed = []
    for parity in verify_models(models, checkpoint, lambda text: typer.echo(text, err=True)):
        figures = ", ".join(f"{name} {value:.1f} dB" for name, value in parity.psnr_db.items())
        verdict = "ok" if parity.holds else "FAILED"
        line = f"{parity.folder} {parity.component}: {figures} (at least {parity.bound_db:.1f} dB): {verdict}"
        typer.echo(line)
        if not parity.holds:
            failed.append(f"{parity.folder} {parity.component}")
    if failed:
        raise VerificationError(f"{models}: differs from {against}: {', '.join(failed)}; convert it again")


def register(app: typer.Typer) -> None:
    """Add ``verify``."""
    app.command()(verify)
