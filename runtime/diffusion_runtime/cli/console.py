"""How the runtime's commands talk: progress and notes go to the error stream, names of files to the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

INTERRUPTED = 130  # what shells call a program that was stopped by Ctrl-C
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


def progress_bar(console: Console) -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def error_console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def say(console: Console, note: str) -> None:
    console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
