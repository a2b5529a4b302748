"""`coreml-sd serve`: converted models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_runtime.cli import options
from diffusion_runtime.cli.console import INTERRUPTED, error_console, say
from diffusion_runtime.cli.options import option, takes

HELP = """
Serve converted models over HTTP.

Each MODELS is a set of models that requests name by its folder's name, or by NAME
in NAME=FOLDER; the first is used where they name none. The APIs:

* [bold]POST /score[/bold]: Azure ML's

* [bold]POST /v1/images/generations, /v1/images/edits[/bold]: OpenAI's

* [bold]POST /sdapi/v1/txt2img, img2img, …[/bold]: the web UI's

* [bold]GET /[/bold] with --ui: a page to draw with in a browser

* [bold]GET /docs, /metrics, /health/live, /health/ready[/bold]

Only this machine can reach it. Any other --host needs --api-key-file, and TLS is
for a proxy before it. SIGTERM finishes the pictures in work.

Examples:

    coreml-sd serve models

    coreml-sd serve sd15=models-a sdxl=models-b --memory-budget 12

    coreml-sd serve models --host 0.0.0.0 --api-key-file keys.txt \\
        --allow-host pictures.example.org
"""
NEEDED = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
FOR_PAGE = ("gradio",)


@takes(options.BACKEND, options.UNITS)
def serve(
    models: Annotated[
        list[str], typer.Argument(help="Folders of models.", metavar="MODELS...", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, option("File with a key on each line, one of which requests must send.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, option("A name that requests may call the server; may be given again.")
    ] = None,
    cors: Annotated[list[str] | None, option("An origin whose web pages may use it; may be given again.")] = None,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to come back (429).", min=1)
    ] = 32,
    deadline: Annotated[float, typer.Option(help="Seconds a request may take, waiting included.", min=1)] = 600.0,
    max_body: Annotated[int, typer.Option(help="MiB of a request.", min=1)] = 32,
    max_steps: Annotated[int, typer.Option(help="Denoising steps of a picture.", min=1)] = 150,
    max_pictures: Annotated[int, typer.Option(help="Pictures of a request.", min=1)] = 10,
    memory_budget: Annotated[
        float | None, option("GB for all models together; those used longest ago are freed. Default: no limit.")
    ] = None,
    threads: Annotated[
        int | None, option("torch backend: threads of each set of models. Default: all cores.")
    ] = None,
    ui: Annotated[bool, option("A page at / to draw with (needs the extra ui).", "--ui")] = False,
    **given: Any,
) -> None:
    options.check_installed("serve", NEEDED, "serve")
    if ui:
        options.check_installed("--ui", FOR_PAGE, "ui")
    from diffusion_runtime.serve import server
    from diffusion_runtime.serve.engine import Engine
    from diffusion_runtime.serve.service import Limits, Service

    loading = options.chosen(given, (*options.BACKEND, *options.UNITS))
    rules = server.rules(host, allow_host or (), cors or (), api_key_file, ui, max_body)
    setups = server.setups(models, loading, threads)
    limits = Limits(pictures=max_pictures, steps=max_steps, seconds=deadline)
    budget = None if memory_budget is None else int(memory_budget * 1e9)
    service = Service(Engine(setups, queue, budget), limits)
    listening = server.listen(host, port)
    shown = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    console = error_console()
    say(console, f"loading models; {shown}/health/ready says when they are there")
    if server.run(
        service,
        rules,
        listening,
        lambda: typer.echo(f"serving {', '.join(service.engine.sets)} at {shown}"),
        ui,
    ):
        raise typer.Exit(INTERRUPTED)


def register(app: typer.Typer) -> None:
    app.command(help=HELP)(serve)
