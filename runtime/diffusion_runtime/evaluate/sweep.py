"""The pictures of a sweep: each set of models at each guidance scale draws the same table with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_runtime.batch import rows
from diffusion_runtime.batch import run as batches
from diffusion_runtime.batch.local import LocalWorkers
from diffusion_runtime.batch.places import Folder
from diffusion_runtime.batch.run import Batch
from diffusion_runtime.batch.worker import Setup
from diffusion_runtime.errors import InputError
from diffusion_runtime.numbers import is_number

SWEPT = "guidance_scale"


@dataclass(frozen=True, slots=True)
class Sweep:
    """``models`` are folders by name, ``options`` generate's for every picture, their seed included; ``setups``
    gives the workers' (`batch.run.setups`) for a folder of models and one of pictures."""

    models: Mapping[str, Path]
    prompts: Path
    scales: Sequence[float]
    output: Path
    options: Mapping[str, Any]
    setups: Callable[[str, str], list[Setup]]
    ignored: Set[str] = frozenset()

    def folder(self, name: str, scale: float) -> Path:
        """Where the pictures of a set of models at a guidance scale are."""
        return self.output / name / f"guidance-{scale:g}"

    def holding(self, name: str, scale: float) -> AbstractContextManager[object]:
        """Keep other commands out of that folder."""
        return Folder(self.folder(name, scale)).hold()

    def batch(self, name: str, scale: float, redo: bool = False) -> Batch:
        """What is to be made for a set of models at a guidance scale; hold its place meanwhile. Raises InputError
        where other pictures are in the way."""
        place = Folder(self.folder(name, scale).absolute())
        setups = self.setups(str(self.models[name].absolute()), str(place.path))
        options = {**self.options, SWEPT: scale}
        plan = batches.prepare(self.prompts, place, options, 1, setups, self.ignored, redo)
        if plan.failed:
            raise InputError(_failed(self.prompts, plan.failed[0]))
        return Batch(plan, place, LocalWorkers(setups))


def _failed(prompts: Path, line: Mapping[str, Any]) -> str:
    return f"{prompts}: row {line['row']}: {line['error']}"


def check_done(batch: Batch, prompts: Path) -> None:
    """Raise InputError for a row of which no picture could be made: without it, sets could not be compared."""
    for answer in batch.answers:
        if answer.error is not None:
            said = _failed(prompts, {"row": answer.task.number, "error": answer.error})
            raise InputError(
                f"{said}; the other pictures are kept: mend or remove the row and run the same command again"
            )


def read_prompts(path: Path, ignored: Set[str]) -> list[str]:
    """The prompts of a table. Raises InputError for rows that cannot be used, and for those with a guidance scale
    of their own."""
    table = rows.read(path, ignored)
    if all("prompt" not in row.given for row in table):
        raise InputError(f'{path}: has no column "prompt"')
    for row in table:
        if row.error is not None:
            raise InputError(_failed(path, {"row": row.number, "error": row.error}))
        if SWEPT in row.options:
            raise InputError(
                f"{path}: row {row.number}: {SWEPT}: the sweep sets it (--guidance): remove the column"
            )
    return [row.options["prompt"] for row in table]


def parse_scales(text: str) -> list[float]:
    """Guidance scales with commas between them, in ascending order. Raises InputError for anything else."""
    found: list[float] = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not is_number(number) or number < 0:
            raise InputError(
                f"--guidance {text}: got {part.strip()!r}, expected numbers from 0 with commas, as 1.5,3,7.5"
            )
        found.append(number)
    if len(set(found)) != len(found):
        raise InputError(f"--guidance {text}: a scale is there twice")
    return sorted(found)


def name_models(models: Sequence[str]) -> dict[str, Path]:
    """Folders by name: FOLDER or NAME=FOLDER. Raises InputError for names that are given twice or are no names."""
    found: dict[str, Path] = {}
    for text in models:
        given, has_name, folder = text.partition("=")
        path = Path(folder if has_name else text)
        name = given if has_name else path.resolve().name
        if not name or name.startswith(".") or "/" in name:
            raise InputError(f"{text}: {name!r} is no name for a folder: give NAME={path}")
        if name in found:
            raise InputError(f"{text}: another set of models is called {name!r}: give NAME={path}")
        found[name] = path
    return found
