"""The fields of `ConvertOptions` as options of a command: what they are called, take and say stands there."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from inspect import Parameter
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from diffusion_convert.options import ConvertOptions, Option, about
from diffusion_runtime.cli.options import Command, declared


def takes(chosen: Callable[[Option], bool], panel: str | None = None) -> Callable[[Command], Command]:
    """Give a command that takes ``**given`` the chosen options, in help under the heading ``panel``."""
    hints = get_type_hints(ConvertOptions)
    added = [_parameter(one, hints[one.name], panel) for one in fields(ConvertOptions) if chosen(about(one))]
    return lambda command: declared(command, added)


def options(given: Mapping[str, Any]) -> ConvertOptions:
    return ConvertOptions(**{name: value for name, value in given.items() if value is not None})


def _parameter(one: Field[Any], hint: Any, panel: str | None) -> Parameter:
    told, default = about(one), one.default
    flag = told.flag or f"--{one.name.replace('_', '-')}"
    if get_origin(hint) in (tuple, Mapping):
        hint, default = list[str] | None, None
    elif isinstance(default, enum.Enum):  # as a text: `ConvertOptions` has the better message
        hint, default = str, default.value
    elif default is True:
        flag = f"{flag}/{flag.replace('--', '--no-')}"
    option = typer.Option(flag, help=told.help, show_default=False, rich_help_panel=panel)
    return Parameter(one.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])
