"""The runtime's commands, a file for each group. `diffusion_convert.cli` puts them beside its own."""

from __future__ import annotations

import typer

from diffusion_runtime.cli import batch, evaluate, generate, machine, serve

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)
for module in (generate, batch, evaluate, serve, machine):
    module.register(app)
