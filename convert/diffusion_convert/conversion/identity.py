"""Which models can stay beside new ones: those of the same source, versions and options."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import InputError
from diffusion_runtime.picture_size import Size
from diffusion_runtime.real_path import real_path

TOOLS = ("coreml-sd", "coremltools", "torch", "diffusers", "transformers")
CHOICES = ("attention", "components", "sizes", "height", "width", "compiled", "zip")
"""Options that say which parts there are and what is put together of them, but not what is in a part of a size."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What models in the output must be of, to stay beside new ones: source, versions and the options that parts
    follow from (``fingerprint``), and ``only`` that size; None: of any, as sizes are added to each other.
    ``whole_weights`` is the fingerprint but for the weights' bits."""

    fingerprint: str
    whole_weights: str
    only: Size | None

    def made(self, made: Manifest) -> bool:
        """Whether the models of that manifest are of it."""
        return self.is_like(made) and (self.only is None or made.sizes == (self.only,))

    def is_like(self, made: Manifest) -> bool:
        """Whether they are but for their sizes: what is of a size that is wanted is of use."""
        return made.tools.get("conversion") == self.fingerprint

    def differs_in_bits(self, made: Manifest) -> bool:
        """Whether they are but for the weights' bits and their sizes: what is not palettized is of use."""
        return made.tools.get("whole_weights") == self.whole_weights and not self.is_like(made)

    @property
    def told(self) -> dict[str, str]:
        """As manifests tell it."""
        return {"conversion": self.fingerprint, "whole_weights": self.whole_weights}

    @property
    def name(self) -> str:
        """Of the folder in which a conversion works: no other conversion's parts may be found there."""
        return _digest([self.fingerprint, None if self.only is None else str(self.only)])


@cache
def tool_versions() -> Mapping[str, str]:
    """What makes the packages, with versions. Kept: they are read out of all that a distribution says of itself."""
    return MappingProxyType({"python": platform.python_version()} | {name: version(name) for name in TOOLS})


def fingerprint(checkpoint: Checkpoint, options: ConvertOptions) -> str:
    """See `Identity`; known without looking at weights: sizes and times of change stand for files' contents."""
    files = {path for tokenizer in checkpoint.tokenizers.values() for path in tokenizer.values()}
    files.update(path for model in checkpoint.models.values() for path in model.files)
    files.update([options.recipe] if options.recipe is not None else [])
    told = {
        "options": {name: value for name, value in asdict(options).items() if name not in CHOICES},
        "source": checkpoint.source.model_dump(),
        "family": checkpoint.family,
        "refiner": None if checkpoint.refiner is None else _told_of_refiner(checkpoint.refiner),
        "configs": {name: dict(model.config) for name, model in checkpoint.models.items()},
        "controlnets": {name: told.model_dump() for name, told in checkpoint.controlnets.items()},
        "schedulers": {name: dict(config) for name, config in checkpoint.schedulers.items()},
        "pipeline": dict(checkpoint.pipeline_config),
        "files": sorted(map(_stamp, files)),
        "tools": dict(tool_versions()),
    }
    return _digest(told)


def _told_of_refiner(refiner: Checkpoint) -> dict[str, Any]:
    told = {"schedulers": refiner.schedulers, "pipeline": dict(refiner.pipeline_config)}
    return {"source": refiner.source.model_dump(), **told}


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=_plain).encode()).hexdigest()


def _stamp(path: Path) -> tuple[str, int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    # The time of change is the file system's: who puts back the other one, as rsync and cp -p do, cannot set it.
    return (str(real_path(path)), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else str(value)
