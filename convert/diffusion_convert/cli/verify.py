"""``coreml-sd verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_convert.options import parse_embedding, parse_list, parse_lora

if TYPE_CHECKING:
    from diffusion_convert.checkpoint.model import Checkpoint


def verify(
    models: Annotated[
        Path, typer.Argument(help="A folder that `convert` wrote, or one of the folders of models in it.")
    ],
    against: Annotated[str, typer.Option(help="The checkpoint that they were converted from.", metavar="SOURCE")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    family: Annotated[str | None, typer.Option(help="The checkpoint's family, where it cannot be told.")] = None,
    variant: Annotated[str | None, typer.Option(help="The variant of its weights that was converted.")] = None,
    base: Annotated[str | None, typer.Option(help="The checkpoint that gave what a single file lacks.")] = None,
    refiner: Annotated[str | None, typer.Option(help="The SDXL refiner that was put in at conversion.")] = None,
    controlnet: Annotated[
        list[str] | None, typer.Option(help="ControlNets that were named at conversion; A,B or several times.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="The VAE that was put in at conversion.")] = None,
    preview_vae: Annotated[str | None, typer.Option(help="The VAE for previews that was put in.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA that was fused, with its weights as at conversion; may be given several times."),
    ] = None,
    lora_partial: Annotated[
        bool, typer.Option("--lora-partial", help="LoRAs were fused with --lora-partial.")
    ] = False,
    embedding: Annotated[
        list[str] | None,
        typer.Option(help="A textual inversion that was put in, FILE or FILE:TOKEN; may be given several times."),
    ] = None,
    ip_adapter: Annotated[
        list[str] | None, typer.Option(help="The IP-Adapters that were put in at conversion, in their order.")
    ] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Their image encoder, as at conversion.")] = None,
    t2i_adapter: Annotated[
        list[str] | None, typer.Option(help="The T2I-Adapters that were named at conversion, in their order.")
    ] = None,
) -> None:
    """Compare every component, packages and compiled, with the source's own networks. Exit code 1: one differs."""
    from diffusion_convert.checkpoint.open import open_checkpoint

    loras = tuple(parse_lora(text) for text in lora or ())
    embeddings = tuple(parse_embedding(text) for text in embedding or ())
    checkpoint = open_checkpoint(
        against,
        revision=revision,
        family=family,
        variant=variant,
        base=base,
        refiner=refiner,
        controlnets=parse_list(controlnet or ()),
        vae=vae,
        preview_vae=preview_vae,
        loras=loras,
        lora_partial=lora_partial,
        embeddings=embeddings,
        ip_adapters=parse_list(ip_adapter or ()),
        image_encoder=image_encoder,
        t2i_adapters=parse_list(t2i_adapter or ()),
    )
    failed = _compare(models, checkpoint)
    if failed:
        advice = _advice({"--vae": vae, "--lora": loras, "--embedding": embeddings})
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


def _advice(options: Mapping[str, object]) -> str:
    missing = [option for option, given in options.items() if not given]
    given = f" (was it converted with {' or '.join(missing)}? then name it here too)" if missing else ""
    return f"convert it again{given}"


def register(app: typer.Typer) -> None:
    """Add ``verify``."""
    app.command()(verify)
