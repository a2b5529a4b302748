"""Options that several commands have, and generate's: one name, one help, one type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from diffusion_runtime.errors import InstallationError

Command = TypeVar("Command", bound=Callable[..., None])
Table = Mapping[str, Any]
"""Options by the names that the command is given them by: each a type, with what it says in help."""


def option(help_text: str, *names: str) -> Any:
    """An option that is not required and whose help says what leaving it out means."""
    return typer.Option(*names, help=help_text, show_default=False)


Backend = Annotated[str, typer.Option(help="auto (coreml on macOS, else torch), coreml or torch.")]
_Texts = list[str] | None
PICTURE: Table = {
    "prompt": Annotated[str | None, option("What to draw.")],
    "negative_prompt": Annotated[str | None, option("What not to draw.")],
    "steps": Annotated[int | None, option("Denoising steps. Default: diffusers' for these models, mostly 50.")],
    "guidance_scale": Annotated[
        float | None,
        option("How closely to follow the prompt; 1 or less: off. Default: the models' (7.5; 5 for SDXL)."),
    ],
    "image_guidance_scale": Annotated[
        float | None, option("InstructPix2Pix: how closely to follow --image. Default: 1.5.")
    ],
    "eta": Annotated[
        float | None, option("Fresh noise in each step of ddim, 0 to 1; tcd's gamma. Others take none. Default: 0.")
    ],
    "height": Annotated[int | None, option("Of models of several sizes, in pixels. Default: their first size's.")],
    "width": Annotated[int | None, option("Of models of several sizes, in pixels. Default: their first size's.")],
    "seed": Annotated[int | None, option("Same seed, same picture. Default: random, printed.")],
    "rng": Annotated[
        str | None, option("torch (as diffusers), numpy (as Apple's Python client) or nvidia. Default: torch.")
    ],
    "scheduler": Annotated[
        str | None,
        option(
            "pndm, ddim, ddpm, lms, euler, euler-ancestral, heun, 'dpm++ 2m karras', 'dpm++ sde', unipc, lcm, …; "
            "an unknown one lists all. Default: the checkpoint's."
        ),
    ],
    "image": Annotated[Path | None, option("Picture to start from, paint in or enlarge.")],
    "strength": Annotated[
        float | None, option("How much of a picture may change, above 0 to 1. Default: 0.8; 1 with a mask.")
    ],
    "mask": Annotated[Path | None, option("White where --image is painted anew.")],
    "depth_image": Annotated[Path | None, option("Depth of --image, brighter is nearer.")],
    "noise_level": Annotated[int | None, option("Upscaling: noise put on --image, 0 to 350. Default: 20.")],
    "long_prompt": Annotated[
        bool | None, option("Refuse a prompt that is too long for the models, rather than cut it.", "--long-prompt")
    ],
    "refiner_start": Annotated[
        float | None,
        option("SDXL with a refiner: the part of the steps after which it goes on, as 0.8. Default: never."),
    ],
    "guess_mode": Annotated[
        bool | None, option("ControlNets steer the prompt's half of the guidance alone.", "--guess-mode")
    ],
}
"""Fields of `png_record.Settings`. To add one: an entry here, and the field."""
BACKEND: Table = {
    "backend": Backend,
    "dtype": Annotated[str | None, option("torch backend: float32, bfloat16 or float16.")],
    "check_safety": Annotated[bool, typer.Option("--safety/--no-safety", help="Use the safety checker.")],
}
UNITS: Table = {
    "compute_units": Annotated[
        str | None, option("all, cpu-and-gpu, cpu-and-ne or cpu-only. Default: the models'.")
    ],
    "device": Annotated[str | None, option("torch backend: cpu, cuda or mps.")],
}
MEMORY: Table = {
    "reduce_memory": Annotated[bool | None, option("Load and free models stage by stage.", "--reduce-memory")],
    "tokenizer": Annotated[Path | None, option("Folder of vocab.json and merges.txt, where MODELS has none.")],
}
LOADING: Table = {
    **BACKEND,
    **UNITS,
    **MEMORY,
    "depth_estimator": Annotated[
        Path | None, option("Folder of models that have one, for --prepare depth, where MODELS has none.")
    ],
    "prediction_type": Annotated[str | None, option("Models without manifest: epsilon, v_prediction or sample.")],
    "latent_scale": Annotated[float | None, option("Models without manifest: the VAE's scaling factor.")],
}
"""Arguments of `load_pipeline`, those above included."""
WORKERS: Table = {
    "workers": Annotated[
        int | None, option("Processes, each with its own models. Default: 1, or one for each unit or device.")
    ],
    "threads": Annotated[int | None, option("torch backend: threads of each worker. Default: half of the cores.")],
    "compute_units": Annotated[str | None, option("Core ML: as cpu-and-ne,cpu-and-gpu for a worker on each.")],
    "device": Annotated[str | None, option("torch backend: as cuda:0,cuda:1 for a worker on each.")],
    "ignore": Annotated[_Texts, option("A column of your own to pass over; may be given again.")],
    "redo": Annotated[bool | None, option("Replace pictures that other rows, options or models made.", "--redo")],
}
"""Of commands that draw the pictures of a table."""
_DEFAULTS: Mapping[str, Any] = {"backend": "auto", "check_safety": True}
"""Of options of which None is no value."""


def takes(*tables: Table) -> Callable[[Command], Command]:
    """Give a command that takes ``**given`` the options of ``tables``."""
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=kind)
        for table in tables
        for name, kind in table.items()
    ]
    return lambda command: declared(command, added)


def declared(command: Command, added: Iterable[Parameter]) -> Command:
    """The command with the options ``added`` in place of its ``**given``; in help its keyword-only ones follow."""
    # typer reads a command's signature: what it is told there, the command is called with.
    *own, _ = signature(command, eval_str=True).parameters.values()
    first = [one for one in own if one.kind is not Parameter.KEYWORD_ONLY]
    command.__signature__ = Signature([*first, *added, *own[len(first) :]])  # type: ignore[attr-defined]
    return command


def chosen(given: Mapping[str, Any], table: Iterable[str]) -> dict[str, Any]:
    """The options of a table that the user has given, paths as texts: pictures' records hold them as JSON."""
    told = {name: given[name] for name in table if given[name] is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}


def check_installed(what: str, modules: Sequence[str], extra: str) -> None:
    """Raise InstallationError, with the remedy, where ``what`` cannot import what it needs."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InstallationError(f"{what} needs {', '.join(missing)}: run `pip install 'coreml-sd[{extra}]'`")
