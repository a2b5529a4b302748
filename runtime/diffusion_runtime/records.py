"""What a picture says of its making, and whether it can be believed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from diffusion_runtime import images
from diffusion_runtime.errors import InputError

LOADING: Mapping[str, Any] = {
    "dtype": str,
    "tokenizer": str,
    "prediction_type": str,
    "latent_scale": float,
}
"""Ways to load models that change pictures: recorded where they were chosen, and the types of their values."""
FILES = ("image", "mask", "depth_image")
"""The settings that name files."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what a picture looks like; what a PNG records of itself and `--from` reads."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    rng: str = "torch"
    scheduler: str | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    image: str | None = None
    mask: str | None = None
    depth_image: str | None = None
    strength: float | None = None
    noise_level: int | None = None
    long_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Past:
    """What a picture says of its making: the models' folder as it was named, and what is known of `LOADING`."""

    settings: Settings
    models: str | None
    loading: Mapping[str, Any]


def read(path: Path, overridden: Set[str] = frozenset()) -> Past:
    """How a picture was made. Raises InputError where it does not say or its record is damaged, and where an input
    file is gone or changed that is not ``overridden`` anyway."""
    data = images.read_metadata(path)
    hints = get_type_hints(Settings)
    known = {field.name: data[field.name] for field in fields(Settings) if field.name in data}
    if "prompt" not in known:
        raise InputError(f"picture {path}: its record lacks the prompt")
    loading = {name: data[name] for name in LOADING if name in data}
    models = data.get("models")
    hashes = {f"{name}_sha256": data.get(f"{name}_sha256") for name in FILES}
    _check_types(path, known, hints)
    _check_types(path, loading, LOADING)
    _check_types(path, {"models": models, **hashes}, dict.fromkeys(("models", *hashes), str | None))
    settings = Settings(**known)
    for name in sorted(set(FILES) - overridden):
        _check_same(path, name, getattr(settings, name), hashes[f"{name}_sha256"])
    return Past(settings, models, loading)


def hashes(settings: Settings) -> dict[str, str]:
    """SHA-256 of the files that went into a picture, by "image_sha256" and so on."""
    named = {name: getattr(settings, name) for name in FILES}
    return {f"{name}_sha256": _sha256(Path(path)) for name, path in named.items() if path is not None}


def _check_types(picture: Path, values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not _is_one(value, types[name]):
            raise InputError(f"picture {picture}: its record is damaged at {name}: {value!r}")


def _is_one(value: object, kind: Any) -> bool:
    """Whether JSON's ``value`` is of a type, or one of a union. Whole numbers are numbers; true, false not."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_same(picture: Path, name: str, path: str | None, expected: str | None) -> None:
    if path is None:
        return
    option = f"--{name.replace('_', '-')}"
    if not Path(path).is_file():
        raise InputError(f"picture {picture}: was made from {path}, which is not there: name it with {option}")
    if expected is not None and _sha256(Path(path)) != expected:
        raise InputError(f"picture {picture}: {path} has changed since: name the file that was used with {option}")
