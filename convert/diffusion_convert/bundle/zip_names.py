"""What zips of a variant's compiled models are called: apps find and tell apart models by these names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from diffusion_runtime.families import ATTENTIONS, AttentionKind
from diffusion_runtime.picture_size import PATTERN as PICTURE_SIZE

if TYPE_CHECKING:
    from diffusion_runtime.bundle.manifest import Manifest
    from diffusion_runtime.picture_size import Size

PATTERN = "coreml-*_compiled.zip"
"""Matches the zips of a folder."""

_NAME = re.compile(
    rf"(?P<stem>.+)_(?P<attention>{'|'.join(sorted(ATTENTIONS, key=len, reverse=True))})_compiled\.zip"
)


def zip_name(made: Manifest, attention: str, size: Size | None = None) -> str:
    """``coreml-stable-diffusion-v1-4-palettized_original_compiled.zip``; of a further ``size``
    ``coreml-stable-diffusion-v1-4-palettized-768x512_original_compiled.zip``: apps look at how names end."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", made.name.rstrip("/").rpartition("/")[2]).strip("-.").lower()
    palettized = any(component.palettization is not None for component in made.components.values())
    marks = ("-palettized" if palettized else "", "" if size is None else f"-{size}")
    return f"coreml-{name}{''.join(marks)}{ending(attention)}"


def is_of_further_size(name: str) -> bool:
    """Whether a zip's name says that it is of another size than the first."""
    return re.search(rf"-{PICTURE_SIZE.pattern}_", name) is not None


def zip_names_by_size(made: Manifest, attention: str) -> dict[Size | None, str]:
    """The names of the zips for each size that has a folder of its own; None: the first size."""
    return {size: zip_name(made, attention, size) for size in (None, *made.size_folders)}


def ending(attention: str) -> str:
    """How the names of an attention's zips end."""
    return f"_{attention}_compiled.zip"


def zip_names(made: Manifest, attention: str, variants: Collection[str]) -> dict[str, Size | None]:
    """The names of all zips of the variant of that attention, in a folder with these variants, and the size that
    each is for (`zip_names_by_size`)."""
    return {
        name: size
        for one in zip_attentions(attention, variants)
        for size, name in zip_names_by_size(made, one).items()
    }


def zip_attentions(attention: str, variants: Collection[str]) -> tuple[str, ...]:
    """The attentions in the names of a variant's zips: its own, and the one that it stands in for where there is no
    variant of that. (Apps ask for split_einsum when they want models for all compute units.)"""
    other = AttentionKind(attention).about.stands_in_for
    return (attention,) if other is None or other in variants else (attention, other)


def stem_of(name: str) -> str | None:
    """What a zip's name says before its attention: the name of the repository in which apps look for it."""
    found = _NAME.fullmatch(name)
    return found["stem"] if found else None
