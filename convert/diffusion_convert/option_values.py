"""Checks of options' values: each takes the option's name and what was given, as the command line does or as Python
does, and returns what the option's field is declared as. All raise InputError for what cannot be used."""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion_runtime.errors import InputError
from diffusion_runtime.picture_size import Size, parse_size

Check = Callable[[str, Any], Any]
E = TypeVar("E", bound=enum.Enum)


def typed(name: str, value: Any, types: tuple[type, ...], expected: str) -> Any:
    """``value``, if it is of one of the types; True is no number."""
    # To Python, True is an int.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise InputError(f"{name} {value!r}: expected {expected}")
    return value


def whole(name: str, value: Any) -> int:
    return int(typed(name, value, (int,), "a whole number"))


def number(name: str, value: Any) -> float:
    return float(typed(name, value, (int, float), "a number"))


def flag(name: str, value: Any) -> bool:
    return bool(typed(name, value, (bool,), "True or False"))


def text(name: str, value: Any) -> str:
    return str(typed(name, value, (str,), "a text"))


def path(name: str, value: Any) -> Path:
    check_path(f"--{name} ", typed(name, value, (str, os.PathLike), "a path"))
    return Path(value)


def source(name: str, value: Any) -> str:
    """A path or the id of a repository on the Hub."""
    check_path(f"--{name.replace('_', '-')} ", typed(name, value, (str, os.PathLike), "a path or Hub id"))
    return str(os.fspath(value))


def sources(name: str, value: Any) -> tuple[str, ...]:
    """``A,B`` -> ``("A", "B")``; a path with a comma in it is taken as it is where it exists."""
    found: list[str] = []
    for one in _several(name, value):
        told = source(name.removesuffix("s"), one)
        is_path = isinstance(one, os.PathLike) or Path(told).exists()
        parts = (told,) if told and is_path else parse_list([told])
        if not parts:
            raise InputError(f"--{name.removesuffix('s').replace('_', '-')} {told!r}: names nothing: leave it out")
        found += parts
    return tuple(found)


def names(name: str, value: Any) -> tuple[str, ...]:
    return parse_list(typed(name, one, (str,), f"names of {name}") for one in _several(name, value))


def bits_by_name(name: str, value: Any) -> dict[str, int]:
    given = parse_nbits(value) if isinstance(value, list) else value
    mapping = typed(name, given, (Mapping,), 'a mapping as {"unet": 6}')
    return {component: whole(f"{name} {component}", bits) for component, bits in mapping.items()}


def size(_: str, value: Any) -> Size:
    if isinstance(value, str):
        return parse_size(value)
    width, height = typed("size", value, (tuple,), "WIDTHxHEIGHT in pixels, as 768x512")
    return Size(*(typed(f"size {value!r}", side, (int,), "whole numbers of pixels") for side in (width, height)))


def one_of(kind: type[E]) -> Check:
    return lambda name, value: value if isinstance(value, kind) else parse_choice(kind, name, value)


def several(check: Check) -> Check:
    """Of a tuple's values; one stands for a tuple of one."""
    return lambda name, value: tuple(check(name, one) for one in _several(name, value))


def listed(check: Check) -> Check:
    """`several` of what a text may hold some of, as A,B."""

    def checked(name: str, value: Any) -> tuple[Any, ...]:
        given = [one.split(",") if isinstance(one, str) else [one] for one in _several(name, value)]
        return tuple(check(name, one) for ones in given for one in ones)

    return checked


def _several(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, os.PathLike, enum.Enum, Size)) or is_dataclass(value):
        return (value,)
    return tuple(typed(name, value, (Iterable,), "one value or several"))


def check_path(option: str, path: str | os.PathLike[str]) -> None:
    """Refuses what no file system takes for a path. ``option``: what it was given as."""
    try:
        usable = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise InputError(f"{option}{os.fspath(path)!a}: no path: it holds a NUL or half a surrogate pair")


def parse_choice(kind: type[E], name: str, text: str) -> E:
    """The member of ``kind`` whose value is ``text``. The error names the known ones."""
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise InputError(f"unknown {name.replace('_', '-')} {text!r}: expected one of {known}") from None


def parse_list(texts: Iterable[str]) -> tuple[str, ...]:
    """``["a,b", "c"]`` -> ``("a", "b", "c")``."""
    return tuple(name for text in texts for part in text.split(",") if (name := part.strip()))


def parse_nbits(texts: Iterable[str]) -> dict[str, int]:
    """``["unet=6"]`` -> ``{"unet": 6}``."""
    found = {}
    for text in parse_list(texts):
        name, _, bits = text.partition("=")
        if not name or not (bits.isascii() and bits.isdecimal()):
            raise InputError(f"--nbits-for {text!r}: expected COMPONENT=BITS, as in unet=6")
        found[name] = int(bits)
    return found


LORA_PARTS = re.compile(r"unet|te|te1|te2|mid|(?:in|out)\d\d")
"""What a LoRA can have a weight of its own for: networks, and the UNet's blocks as trainers count them."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file or folder and the weight at which it is fused. A path's text is taken for the path.

    ``parts`` are other weights by part: "unet", "te" (text encoders; "te1" and "te2" for one of them) and the
    UNet's blocks ("in00" …, "mid", "out00" …). The most particular one counts, and takes the place of the others.
    """

    path: Path
    weight: float = 1.0
    parts: tuple[tuple[str, float], ...] = ()

    if TYPE_CHECKING:  # what is taken for the fields' types

        def __init__(
            self,
            path: str | os.PathLike[str],
            weight: float = 1.0,
            parts: Mapping[str, float] | Iterable[tuple[str, float]] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(typed("LoRA path", self.path, (str, os.PathLike), "a path")))
        check_path("--lora ", self.path)
        given = self.parts.items() if isinstance(self.parts, Mapping) else self.parts
        parts = dict(typed("LoRA parts", given, (Iterable,), 'weights by part, as {"te": 0.5}'))
        for name, weight in {"": self.weight, **parts}.items():
            if not math.isfinite(typed("LoRA weight", weight, (int, float), "a number")):
                raise InputError(f"{self.path}: LoRA weight {weight}: expected a number")
            if name and LORA_PARTS.fullmatch(name) is None:
                raise InputError(
                    f"{self.path}: LoRA weight for {name!r}: expected unet, te, te1, te2, mid or a block as in04"
                )
        object.__setattr__(self, "parts", tuple(parts.items()))


@dataclass(frozen=True, slots=True)
class Embedding:
    """A file of textual inversion (or a folder with learned_embeds.safetensors) and what prompts call it. ``token``
    None: as the file calls it, else the file's name. A path's text is taken for the path."""

    path: Path
    token: str | None = None

    if TYPE_CHECKING:  # what is taken for the fields' types

        def __init__(self, path: str | os.PathLike[str], token: str | None = None) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(typed("embedding", self.path, (str, os.PathLike), "a path")))
        check_path("--embedding ", self.path)
        if self.token is not None and not typed("embedding token", self.token, (str,), "a text").strip():
            raise InputError(f"--embedding {self.path}: the token after the colon is empty")


def parse_lora(text: str) -> Lora:
    """``PATH``, ``PATH:WEIGHT``, ``PATH:PART=WEIGHT,…`` or ``PATH:WEIGHT,PART=WEIGHT,…``; a path with a colon in it
    is taken as it is where it exists."""
    path, colon, told = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(Path(text))
    first, *others = told.split(",")
    whole, pairs = ("1", [first, *others]) if "=" in first else (first, others)
    try:
        weight = float(whole)
        parts = [(name.strip(), float(value)) for name, _, value in (pair.partition("=") for pair in pairs)]
    except ValueError:
        raise InputError(
            f"--lora {text!r}: expected PATH, PATH:WEIGHT or PATH:WEIGHT,PART=WEIGHT, as in "
            "style.safetensors:0.8,te=0"
        ) from None
    names = [_block(name) for name, _ in parts]
    if len(set(names)) < len(names):
        raise InputError(f"--lora {text!r}: a part has two weights: expected one")
    return Lora(Path(path), weight, tuple(zip(names, (value for _, value in parts), strict=True)))


def _block(part: str) -> str:
    """``in4`` -> ``in04``."""
    found = re.fullmatch(r"(in|out)(\d)", part)
    return f"{found[1]}0{found[2]}" if found is not None else part


def parse_embedding(text: str) -> Embedding:
    """``FILE`` or ``FILE:TOKEN``; a path with a colon in it is taken as it is where it exists."""
    path, colon, token = text.rpartition(":")
    return Embedding(path, token) if colon and not Path(text).exists() else Embedding(text)


def lora(_: str, value: Any) -> Lora:
    if isinstance(value, Lora):
        return value
    return parse_lora(value) if isinstance(value, str) else Lora(value)


def embedding(_: str, value: Any) -> Embedding:
    if isinstance(value, Embedding):
        return value
    return parse_embedding(value) if isinstance(value, str) else Embedding(value)
