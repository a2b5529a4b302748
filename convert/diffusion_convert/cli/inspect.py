"""``coreml-sd inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    path: Annotated[Path, typer.Argument(help="A package, a compiled model, a folder of them, or a zip.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show interface, operations, precision, sizes, work and what would keep a model off the Neural Engine."""
    from diffusion_convert.inspect import inspect as reports_of
    from diffusion_convert.inspect.show import as_json, as_text

    reports = reports_of(path)
    typer.echo(as_json(reports) if json else as_text(reports))
