"""What a picture says of its making, and whether it can be believed.

A record names files and folders from the picture's folder or the current one where they lie below it, else by their
last name alone: a whole path would tell those who get the picture how its maker's computer is laid out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from diffusion_runtime import images
from diffusion_runtime.control import ControlFile, read_file
from diffusion_runtime.errors import InputError

LOADING: Mapping[str, Any] = {
    "dtype": str,
    "tokenizer": str,
    "depth_estimator": str,
    "prediction_type": str,
    "latent_scale": float,
}
"""Ways to load models that change pictures: recorded where they were chosen, and the types of their values."""
FOLDERS = ("tokenizer", "depth_estimator")
"""Those of `LOADING` that name folders."""
FILES = ("image", "mask", "depth_image")
"""The settings that name files."""
LISTED: Mapping[str, str] = {
    "controls": "--control",
    "adapters": "--adapter",
    "ip_adapter_images": "--ip-adapter-image",
}
"""The settings that name several, each with its hash beside it; and the options that give them."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what a picture looks like; what a PNG records of itself and `--from` reads."""

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    rng: str = "torch"
    scheduler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    image: str | None = None
    mask: str | None = None
    depth_image: str | None = None
    strength: float | None = None
    noise_level: int | None = None
    long_prompt: bool = False
    refiner_start: float | None = None
    controls: tuple[ControlFile, ...] = ()
    guess_mode: bool = False
    adapters: tuple[ControlFile, ...] = ()
    ip_adapter_images: tuple[ControlFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Past:
    """What a picture says of its making: the models' folder as it was named, and what is known of `LOADING`. The
    settings' files are where they were found."""

    picture: Path
    settings: Settings
    models: str | None
    loading: Mapping[str, Any]


def read(path: Path, overridden: Set[str] = frozenset()) -> Past:
    """How a picture was made. Raises InputError where it does not say or its record is damaged, and where an input
    file is gone or changed that is not ``overridden`` anyway."""
    data = images.read_metadata(path)
    known = {field.name: data[field.name] for field in fields(Settings) if field.name in data}
    listed = {name: known.pop(name, []) for name in LISTED}
    if "prompt" not in known:
        raise InputError(f"picture {path}: its record lacks the prompt")
    loading = {name: data[name] for name in LOADING if name in data}
    models = data.get("models")
    hashes = {f"{name}_sha256": data.get(f"{name}_sha256") for name in FILES}
    types = {**get_type_hints(Settings), **LOADING, **dict.fromkeys(("models", *hashes), str | None)}
    for name, value in {**known, **loading, "models": models, **hashes}.items():
        if not _is_one(value, types[name]):
            raise InputError(f"picture {path}: its record is damaged at {name}: {value!r}")
    settings = Settings(**known)
    wanted = [name for name in FILES if name not in overridden and getattr(settings, name) is not None]
    inputs: dict[str, Any] = {
        name: _input(path, _option(name), getattr(settings, name), hashes[f"{name}_sha256"]) for name in wanted
    }
    inputs |= {name: _controls(path, name, listed[name]) for name in LISTED if name not in overridden}
    return Past(path, replace(settings, **inputs), models, loading)


def named(path: str, picture: Path) -> str:
    """How the record of ``picture`` names a file or folder: from the picture's folder, else from the current one,
    else from the home folder ("~/…", which does not tell whose), else in full."""
    target, *folders = (Path(os.path.abspath(one)) for one in (path, picture.parent, "."))  # noqa: PTH100 keeps links
    for folder in folders:
        if target.is_relative_to(folder):
            return target.relative_to(folder).as_posix()
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 never fails
    return f"~/{target.relative_to(home).as_posix()}" if target.is_relative_to(home) else target.as_posix()


def named_inputs(settings: Settings, picture: Path) -> dict[str, Any]:
    """The settings that name files, as the record of ``picture`` names them."""
    given = {name: getattr(settings, name) for name in FILES}
    listed = {
        name: [
            {**asdict(control), "image": named(control.image, picture), "sha256": _sha256(Path(control.image))}
            for control in getattr(settings, name)
        ]
        for name in LISTED
    }
    return {
        **{name: named(path, picture) for name, path in given.items() if path is not None},
        **listed,
    }


def by_content(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """What of `LISTED` is there, with SHA-256 in place of the files' names."""
    return {
        name: [{**asdict(one), "image": _sha256(Path(one.image))} for one in listed]
        for name in LISTED
        if (listed := getattr(settings, name))
    }


def find(picture: Path, name: str, remedy: str) -> str:
    """Find the file that a picture's metadata calls ``name``: next to the picture, or in the current folder. Raises
    InputError that ends in ``remedy`` where it is not there."""
    for place in _places(picture, name):
        if place.exists():
            return str(place)
    raise InputError(
        f"picture {picture}: its record names {name}, which is neither next to the picture nor in the current "
        f"folder: {remedy}"
    )


def _controls(picture: Path, setting: str, recorded: object) -> tuple[ControlFile, ...]:
    """The record's pictures of one of `LISTED`, their files where they were found."""
    if not isinstance(recorded, list):
        raise InputError(f"picture {picture}: its record is damaged at {setting}: {recorded!r}")
    found = []
    for value in recorded:
        control = read_file(value)
        if control is None or not isinstance(value.get("sha256"), str | None):
            raise InputError(f"picture {picture}: its record is damaged at {setting}: {value!r}")
        option = f"{LISTED[setting]} {control.name}=" if control.name else LISTED[setting]
        path = _input(picture, option, control.image, value.get("sha256"))
        found.append(replace(control, image=path))
    return tuple(found)


def hashes(settings: Settings) -> dict[str, str]:
    """SHA-256 of the files that went into a picture, by "image_sha256" and so on; a control's is with it."""
    named = {name: getattr(settings, name) for name in FILES}
    return {f"{name}_sha256": _sha256(Path(path)) for name, path in named.items() if path is not None}


def _is_one(value: object, kind: Any) -> bool:
    """Whether JSON's ``value`` is of a type, or one of a union. Whole numbers are numbers; true, false not."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _places(picture: Path, name: str) -> tuple[Path, ...]:
    return picture.parent / name, Path(os.path.expanduser(name))  # noqa: PTH111


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _input(picture: Path, option: str, name: str, expected: str | None) -> str:
    """The file that went into a picture, and is named by ``option``. Raises InputError where it is gone or has
    changed."""
    found = find(picture, name, f"name it with {option}")
    for place in _places(picture, name):
        if place.is_file() and expected in (None, _sha256(place)):
            return str(place)
    raise InputError(
        f"picture {picture}: its record names {name}, but {found} has changed since: name the file that was used "
        f"with {option}"
    )
