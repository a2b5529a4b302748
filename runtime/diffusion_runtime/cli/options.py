"""Options that several commands have: one name, one help, one type."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_runtime.errors import InstallationError


def option(help_text: str, *names: str) -> Any:
    """An option that is not required and whose help says what leaving it out means."""
    return typer.Option(*names, help=help_text, show_default=False)


Backend = Annotated[str, typer.Option(help="auto (coreml on macOS, else torch), coreml or torch.")]
ComputeUnits = Annotated[str | None, option("all, cpu-and-gpu, cpu-and-ne or cpu-only. Default: the models'.")]
Device = Annotated[str | None, option("torch backend: cpu, cuda or mps.")]
Dtype = Annotated[str | None, option("torch backend: float32, bfloat16 or float16.")]
ReduceMemory = Annotated[bool, option("Load and free models stage by stage.", "--reduce-memory")]
Tokenizer = Annotated[Path | None, option("Folder of vocab.json and merges.txt, where MODELS has none.")]
Safety = Annotated[bool, typer.Option("--safety/--no-safety", help="Use the safety checker.")]

# Of commands that draw with workers: a list of units or devices is a worker on each.
EachUnit = Annotated[str | None, option("Core ML: as cpu-and-ne,cpu-and-gpu for a worker on each.")]
EachDevice = Annotated[str | None, option("torch backend: as cuda:0,cuda:1 for a worker on each.")]
WorkerThreads = Annotated[int | None, option("torch backend: threads of each worker. Default: half of the cores.")]
Ignored = Annotated[list[str] | None, option("A column of your own to pass over; may be given again.")]


def check_installed(what: str, modules: Sequence[str], extra: str) -> None:
    """Raise InstallationError, with the remedy, where ``what`` cannot import what it needs."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InstallationError(f"{what} needs {', '.join(missing)}: run `pip install 'coreml-sd[{extra}]'`")


def given(**options: Any) -> dict[str, Any]:
    """The options that the user has given, paths as texts: pictures' records hold them as JSON."""
    told = {name: value for name, value in options.items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}
