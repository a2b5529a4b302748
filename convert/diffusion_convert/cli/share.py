"""``coreml-sd publish`` and ``coreml-sd download``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion_runtime.families import ATTENTIONS


def publish(
    folder: Annotated[Path, typer.Argument(help="A folder that `convert` wrote.")],
    repo_id: Annotated[str, typer.Option(help="OWNER/NAME of the model repository; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public (else: private).")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded, and upload nothing.")
    ] = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified",
            help="Also models that were never compared with their source: of --no-verify or other tools.",
        ),
    ] = False,
    endpoint: Annotated[str | None, typer.Option(envvar="HF_ENDPOINT", help="Another server than the Hub.")] = None,
) -> None:
    """Upload models, zips and model card to the Hugging Face Hub; what is there already is not sent again.

    Models that were never verified, those of other tools among them, are refused without --unverified.
    """
    from diffusion_convert.hub.publish import planned_upload
    from diffusion_convert.hub.publish import publish as publish_folder

    if dry_run:
        upload = planned_upload(folder, repo_id, not public, unverified)
        for name in upload.files:
            typer.echo(name)
        for note in upload.notes:
            typer.echo(f"note: {note}", err=True)
        kind = "private" if upload.private else "public"
        typer.echo(f"{len(upload.files)} files, {upload.size_bytes / 1e6:.1f} MB, to {repo_id} ({kind} if new)")
        return
    url = publish_folder(
        folder, repo_id, private=not public, unverified=unverified, endpoint=endpoint, report=typer.echo
    )
    typer.echo(url)


def download(
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME of the model repository.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the models.")],
    variant: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(ATTENTIONS)}; default: the first that is there."),
    ] = None,
    kind: Annotated[str, typer.Option(help="compiled or packages.")] = "compiled",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    endpoint: Annotated[str | None, typer.Option(envvar="HF_ENDPOINT", help="Another server than the Hub.")] = None,
) -> None:
    """Download one variant from the Hugging Face Hub; every file is checked."""
    from diffusion_convert.hub.download import download as fetch

    path = fetch(
        repo_id, output, variant=variant, kind=kind, revision=revision, endpoint=endpoint, report=typer.echo
    )
    typer.echo(str(path))
