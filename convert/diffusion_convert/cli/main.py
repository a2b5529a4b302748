"""The command ``coreml-sd``: its subcommands, a file for each group, and how it ends."""

from __future__ import annotations

import errno
import io
import os
import sys
from functools import cache
from typing import Annotated, Any

import typer

from diffusion_convert.cli import bench, bundle, convert, inspect, palettize, share, verify
from diffusion_runtime import cli as runtime
from diffusion_runtime import memory
from diffusion_runtime.cli import interruption
from diffusion_runtime.cli.console import INTERRUPTED
from diffusion_runtime.errors import DiffusionError

BAD_INPUT = 2
_LONGEST = 2000  # characters of a message: hostile names and values are longer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Convert Stable Diffusion checkpoints to Core ML on any machine, check them there, and run them.",
)


@cache
def _command() -> Any:
    """All commands with their options, as typer makes them of functions: once for whoever calls `main` again."""
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"coreml-sd {version('coreml-sd')}")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_version, show_default=False
        ),
    ] = False,
) -> None:
    """Options that stand before a command."""


def _system_error(error: OSError) -> str:
    if error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror or error}"
    if error.errno == errno.ENOENT:  # no file was named: it is where relative paths begin
        return "the working folder is not there any more; change to another one"
    return error.strerror or str(error)


def _one_line(text: str) -> str:
    """Without line breaks and what is no letter, and without the middle of what no one would read."""
    shown = " ".join(text.split())
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST // 2]} … {plain[-_LONGEST // 2 :]}"


def main() -> None:
    """The entry point: prints our own and the system's errors as one line with exit code 2; Ctrl-C gives exit code
    130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for the names of files that are not UTF-8
    # torch's large tensors in the system's large pages (Linux): a tenth less time, which was spent on page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    memory.keep_freed()
    try:
        interruption.heed()
        with interruption.seen():
            code = _command()(standalone_mode=False)
    except DiffusionError as error:
        typer.echo(f"error: {_one_line(str(error))}", err=True)
        sys.exit(BAD_INPUT)
    except OSError as error:  # names that are too long, folders that may not be read, a full disk
        typer.echo(f"error: {_one_line(_system_error(error))}", err=True)
        sys.exit(BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        show = getattr(error, "show", None)  # click's: unknown options and the like
        if show is None:
            raise
        show()
        sys.exit(BAD_INPUT)
    if code == INTERRUPTED:  # typer's: commands that have more to say leave with SystemExit
        typer.echo("interrupted", err=True)
    sys.exit(code if isinstance(code, int) else 0)


app.command(help=convert.CONVERT_HELP)(convert.convert)
app.command()(palettize.palettize)
app.command("compile")(bundle.compile_)
app.command()(bundle.bundle)
app.command()(verify.verify)
app.command()(inspect.inspect)
app.command()(share.publish)
app.command()(share.download)
app.command(help=bench.HELP)(bench.bench)
app.registered_commands.extend(runtime.app.registered_commands)
