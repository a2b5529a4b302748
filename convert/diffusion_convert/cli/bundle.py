"""``coreml-sd compile`` and ``coreml-sd bundle``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    from diffusion_convert.compile import Compiler


def compile_(
    packages: Annotated[list[Path], typer.Argument(help="One or more .mlpackage folders.", metavar="PACKAGE...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the .mlmodelc.")],
    name: Annotated[str | None, typer.Option(help="Name of the compiled model, without suffix.")] = None,
    compiler: Annotated[str, typer.Option(help="python (any machine) or xcrun (macOS with Xcode).")] = "python",
) -> None:
    """Compile packages to .mlmodelc on any machine, without Xcode."""
    from diffusion_convert.compile import compile_package

    if name is not None and len(packages) > 1:
        raise InputError("--name is for one package; got several")
    if name is not None:
        name = name.removesuffix(".mlmodelc")
        if not name or name.startswith(".") or Path(name).name != name or len(name) > 200:
            raise InputError(f"--name {name!r}: expected a plain name, without folders, as in Unet")
    chosen = _compiler(compiler)
    for package in packages:
        compiled = compile_package(package, output, name, chosen)
        typer.echo(str(compiled.path))
        if compiled.inferred:
            typer.echo(f"note: operation versions inferred for {', '.join(compiled.inferred)}", err=True)


def bundle(
    folder: Annotated[
        Path, typer.Argument(help="A folder that `convert` wrote, or packages or compiled models of Apple's tools.")
    ],
    zips: Annotated[bool, typer.Option("--zip", help="Write a zip of each variant's compiled models.")] = False,
    card: Annotated[bool, typer.Option(help="Write README.md, the model card.")] = True,
    picture: Annotated[Path | None, typer.Option(help="A sample picture, for the model card.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Models of other tools: the checkpoint's name, which the zips are named for.")
    ] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="Models of other tools: epsilon, v_prediction or sample.")
    ] = None,
    latent_scale: Annotated[
        float | None, typer.Option(help="Models of other tools: the VAE's scaling factor.")
    ] = None,
    compiler: Annotated[str, typer.Option(help="python (any machine) or xcrun (macOS with Xcode).")] = "python",
) -> None:
    """Compile the variants of a folder, share equal files, write the model card and, if asked for, zips.

    Models that Apple's tools made get a manifest and, where they are in no variant's place, are linked to one.
    """
    from diffusion_convert.bundle.folder import BundleOptions, bundle_folder
    from diffusion_runtime.bundle.without_manifest import Assumed

    options = BundleOptions(zips, card, picture, Assumed(prediction_type, latent_scale), name, _compiler(compiler))
    done = bundle_folder(folder, options, typer.echo, lambda note: typer.echo(f"note: {note}", err=True))
    if done.saved_bytes:
        typer.echo(f"equal files are stored once: {done.saved_bytes / 1e6:.1f} MB saved")
    for path in (*done.zips, *filter(None, [done.card])):
        typer.echo(str(path))


def _compiler(text: str) -> Compiler:
    from diffusion_convert.compile import Compiler

    try:
        return Compiler(text)
    except ValueError as error:
        raise InputError(f"--compiler {text!r}: expected {' or '.join(item.value for item in Compiler)}") from error
