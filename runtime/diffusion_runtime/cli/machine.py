"""`coreml-sd doctor` and `coreml-sd run-models`: this machine, and its models for programs in other languages."""

from __future__ import annotations

import sys

import typer

from diffusion_runtime.cli.console import INTERRUPTED, error_console
from diffusion_runtime.cli.options import Backend


def run_models(
    backend: Backend = "auto",
) -> None:
    """Run models for a program in another language, over standard input and output.

    A request is a line of JSON and the bytes of its arrays: see the module diffusion_runtime.run_models. The Swift
    package uses it on systems without Core ML."""
    from diffusion_runtime.backends import load_backend
    from diffusion_runtime.run_models import serve

    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not be taken for an answer
    try:
        serve(load_backend(backend), sys.stdin.buffer, answers)
    except (BrokenPipeError, KeyboardInterrupt):  # the program that asked has ended
        sys.exit(INTERRUPTED)


def doctor() -> None:
    """Say what this machine can do, what is missing, and how to get it."""
    from diffusion_runtime import diagnosis

    findings = diagnosis.examine()
    console = error_console()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        typer.echo(f"{finding.state.value:<8} {finding.name:<{width}}  {finding.text}")
        if finding.remedy:
            typer.echo(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    if any(finding.state is diagnosis.State.BROKEN for finding in findings):
        console.print("something is broken: see above")
        raise typer.Exit(2)


def register(app: typer.Typer) -> None:
    app.command()(run_models)
    app.command()(doctor)
