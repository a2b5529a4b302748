"""Pictures that steer: what is asked of ControlNets (Zhang et al. 2023, arXiv 2302.05543).

`Control` is one picture for one ControlNet, `ControlFile` the same as a command line, a table or a record names it,
`pictures` makes such pictures of photographs, and `steering` runs the ControlNets in the denoising loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_runtime import images
from diffusion_runtime.errors import InputError
from diffusion_runtime.numbers import is_number

PREPARATIONS = ("canny", "depth", "inpaint", "tile")
"""Ways to make a ControlNet's picture of any other (`pictures.PREPARE`): its edges, its depth, itself without
what a mask covers, itself resized."""
MAX_SCALE = 100.0
SYNTAX = "NAME=PICTURE[:SCALE[:START[:END]]]"


@dataclass(frozen=True, slots=True)
class Control:
    """``image`` steers through the ControlNet ``name``. ``scale``: how strongly, None: as diffusers' pipeline for
    the task does unless told. ``start`` and ``end``: the part of the steps in which it does, 0 to 1. ``prepare``:
    how the ControlNet's picture is made of ``image``, one of `PREPARATIONS`; None: it is that picture.

    Raises InputError for values that no ControlNet could use."""

    name: str
    image: Image.Image
    scale: float | None = None
    start: float = 0.0
    end: float = 1.0
    prepare: str | None = None

    def __post_init__(self) -> None:
        given: object = self.image
        if not isinstance(given, Image.Image):
            kind = type(given).__name__
            raise InputError(f"control picture {self.name!r} is a {kind}: expected one PIL picture")
        if self.scale is not None and not (is_number(self.scale) and abs(self.scale) <= MAX_SCALE):
            raise InputError(f"control {self.name!r}: scale {self.scale!r}: expected a number, usually 0 to 2")
        for what, part in (("start", self.start), ("end", self.end)):
            if not is_number(part) or not 0 <= part <= 1:
                raise InputError(f"control {self.name!r}: {what} {part!r}: expected a part of the steps, 0 to 1")
        if self.start >= self.end:
            raise InputError(
                f"control {self.name!r}: start {self.start:g} is not before end {self.end:g}: it steers no step"
            )
        check_preparation(self.prepare)


@dataclass(frozen=True, slots=True)
class ControlFile:
    """As `Control`, of a picture file that is called ``image``."""

    name: str
    image: str
    scale: float | None = None
    start: float = 0.0
    end: float = 1.0
    prepare: str | None = None

    def opened(self) -> Control:
        """With the picture. Raises InputError where it cannot be read."""
        picture = images.load(Path(self.image), f"--control {self.name}=")
        return Control(self.name, picture, self.scale, self.start, self.end, self.prepare)


def check_preparation(prepare: object) -> None:
    """Raise InputError for what is neither None nor one of `PREPARATIONS`."""
    if prepare is not None and prepare not in PREPARATIONS:
        raise InputError(f"control pictures are prepared by {', '.join(PREPARATIONS)}; got {prepare!r}")


def parse(
    text: str,
    option: str = "--control",
    syntax: str = SYNTAX,
    parts: Sequence[str] = ("scale", "start", "end"),
    needs_name: bool = True,
) -> ControlFile:
    """``canny=edges.png:0.8:0:0.5`` as a ControlFile, its numbers in the order of ``parts``. Raises InputError for
    anything else."""
    name, equals, rest = text.partition("=")
    if not needs_name and (not equals or Path(text).exists()):
        name, rest = "", text
    if (needs_name and not name.strip()) or not rest.strip():
        raise InputError(f"{option} {text!r}: expected {syntax}")
    path, numbers = rest.strip(), list[float]()
    # A file's name may end in what looks like a number, too.
    while ":" in path and len(numbers) < len(parts) and not Path(path).exists():
        before, _, last = path.rpartition(":")
        try:
            numbers.insert(0, float(last))
        except ValueError:
            break
        path = before
    told: dict[str, Any] = dict(zip(parts, numbers, strict=False))
    return ControlFile(name.strip(), path, **told)


def prepared(controls: Iterable[ControlFile], preparations: Iterable[str]) -> tuple[ControlFile, ...]:
    """``controls`` with what ``--prepare`` says of them: ``canny=canny``, or of the only one ``canny`` alone.

    Raises InputError for a control that is not there and a preparation that nobody knows."""
    found = list(controls)
    names = list(dict.fromkeys(control.name for control in found))
    for text in preparations:
        name, _, how = text.rpartition("=")
        if not name and len(names) == 1:
            (name,) = names
        if name not in names:
            known = ", ".join(names) or "none"
            raise InputError(f"--prepare {text}: expected NAME=HOW, NAME as in --control (there: {known})")
        check_preparation(how)
        found = [replace(control, prepare=how) if control.name == name else control for control in found]
    return tuple(found)


def read_file(value: Any) -> ControlFile | None:
    """What a record holds of a control as a ControlFile; None where it is damaged."""
    text, number = str, float | int
    kinds: dict[str, Any] = {"name": text, "image": text, "scale": number | None, "start": number, "end": number}
    kinds["prepare"] = str | None
    if not isinstance(value, dict) or not all(isinstance(value.get(name), kind) for name, kind in kinds.items()):
        return None
    return ControlFile(**{name: value[name] for name in kinds})


def chosen(name: str, known: Sequence[str], kind: str = "ControlNet") -> str:
    """The network of a ``kind`` that is meant: the one of that name, or the only one in whose name it occurs.

    Raises InputError with those that are ``known`` where there is none, or more than one."""
    if name in known:
        return name
    found = [one for one in known if name.lower() in one.lower()]
    if len(found) == 1:
        return found[0]
    if not known:
        raise InputError(
            f"control {name!r}: these models have no ControlNets: convert again with --controlnet SOURCE"
        )
    which = f"is part of the names of {len(found)}" if found else f"is none of these models' {kind}s"
    raise InputError(
        f"{'control' if kind == 'ControlNet' else kind} {name!r} {which}; there are {', '.join(known)}"
    )
