"""Rows as tasks: a seed and a key for each, and what an earlier run of the same batch has done of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_runtime import noise, png_record, strict_json
from diffusion_runtime.batch.places import Line, Place
from diffusion_runtime.batch.rows import Row
from diffusion_runtime.errors import DiffusionError, InputError
from diffusion_runtime.png_record import FILES, LISTED, Settings

KEY = "batch_key"
"""What a picture's record calls the key of its task."""


@dataclass(frozen=True, slots=True)
class Task:
    """One row to be made. ``settings`` have the first picture's seed; ``key`` is a hash of all that decides what
    the pictures look like, and the models are part of it."""

    number: int
    given: Mapping[str, Any]
    settings: Settings
    count: int
    key: str

    @property
    def name(self) -> str:
        return f"{self.number:06}.png"

    @property
    def files(self) -> tuple[str, ...]:
        """The names that `generation.plan` gives to ``count`` pictures of ``name``."""
        stem = f"{self.number:06}"
        return (self.name,) if self.count == 1 else tuple(f"{stem}-{i}.png" for i in range(1, self.count + 1))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a task: ``flagged`` for each of its pictures, or ``error``."""

    task: Task
    flagged: tuple[bool, ...] = ()
    seconds: float | None = None
    error: str | None = None

    def lines(self) -> list[Line]:
        """What results.jsonl says of it: a line for each picture, one for a failure."""
        made = (
            [(None, None, None)]
            if self.error
            else list(zip(self.task.files, _seeds(self.task), self.flagged, strict=True))
        )
        seconds = None if self.seconds is None else round(self.seconds / len(made), 3)
        return [
            _line(self.task.number, self.task.given, file, seed, seconds, flagged, self.error, self.task.key)
            for file, seed, flagged in made
        ]


@dataclass(frozen=True, slots=True)
class Plan:
    """``to_make`` is to be made; ``done`` and ``failed`` are lines of results.jsonl, of an earlier run and of rows
    that cannot be used."""

    to_make: tuple[Task, ...]
    done: tuple[Line, ...]
    failed: tuple[Line, ...]


def tasks_of(
    rows: Iterable[Row], defaults: Mapping[str, Any], count: int, models: str
) -> tuple[list[Task], list[Line]]:
    """The tasks of all rows, and the lines of those that cannot be used. ``defaults`` are options for rows that do
    not say them; the pictures of the whole table have seeds that count up from its "seed", so that a picture does
    not depend on who makes it and when. ``models`` says which models they are."""
    first, tasks, failed = int(defaults.get("seed", 0)), [], []
    for row in rows:
        pictures = count if row.count is None else row.count
        settings = Settings(**{"prompt": "", **defaults, "seed": first, **row.options})
        first += pictures
        try:
            if row.error:
                raise InputError(row.error)
            if pictures < 1:
                raise InputError(f"count {pictures}: expected at least 1")
            noise.from_seeds([settings.seed, settings.seed + pictures - 1], settings.rng)
            tasks.append(Task(row.number, row.given, settings, pictures, _key(settings, pictures, models)))
        except DiffusionError as error:
            failed.append(_line(row.number, row.given, error=str(error)))
    return tasks, failed


def plan(tasks: Sequence[Task], failed: Sequence[Line], place: Place, redo: bool = False) -> Plan:
    """What is left of a batch. Results count where their pictures are there, and pictures where they say that they
    are of this task: a kill may come between the two.

    Raises InputError where a picture of another batch is in the way, unless it is to be made anew (``redo``)."""
    there = place.pictures()
    earlier = {(line["row"], line["file"]): line for line in _read(place.read_results()) if line.get("file")}
    to_make, done = [], []
    for task in tasks:
        lines = [
            _found(task, index, earlier.get((task.number, name)), place)
            for index, name in enumerate(task.files)
            if name in there
        ]
        if None in lines and not redo:
            raise InputError(
                f"{task.files[lines.index(None)]} is there already and is not what row {task.number} asks for now, "
                "with these models and options: name another folder, or have it replaced with --redo"
            )
        if len(lines) == task.count and None not in lines:
            done += [line for line in lines if line is not None]
        else:
            to_make.append(task)
    return Plan(tuple(to_make), tuple(done), tuple(failed))


def _found(task: Task, index: int, line: Line | None, place: Place) -> Line | None:
    """The line of a picture that is there; None where it is another task's."""
    if line is not None and line.get("key") == task.key:
        return line
    record = place.record(task.files[index])
    if record.get(KEY) != task.key:
        return None
    flagged = bool(record.get("flagged"))
    return _line(task.number, task.given, task.files[index], _seeds(task)[index], None, flagged, None, task.key)


def _read(text: str) -> list[dict[str, Any]]:
    """The lines of results.jsonl; the last one may have been cut off by a kill."""
    found = []
    for line in text.splitlines():
        try:
            found.append(strict_json.parse_object(line, "results", InputError))
        except InputError:
            continue
    return [line for line in found if isinstance(line.get("row"), int)]


def _seeds(task: Task) -> list[int]:
    return [task.settings.seed + i for i in range(task.count)]


def _line(
    row: int,
    given: Mapping[str, Any],
    file: str | None = None,
    seed: int | None = None,
    seconds: float | None = None,
    flagged: bool | None = None,
    error: str | None = None,
    key: str | None = None,
) -> Line:
    told = {"file": file, "seed": seed, "seconds": seconds, "flagged": flagged, "error": error, "key": key}
    return {"row": row, "input": dict(given), **told}


def _key(settings: Settings, count: int, models: str) -> str:
    files = [(name, getattr(settings, name)) for name in FILES]
    files += [
        (f"{option[2:]} {one.name}", one.image)
        for name, option in LISTED.items()
        for one in getattr(settings, name)
    ]
    for name, path in files:
        if path is not None and not Path(path).is_file():
            raise InputError(f"{name} {path}: no such file")
    # Defaults are left out: an option that is new to a later version changes no key of an earlier one's batch.
    usual = asdict(Settings(prompt=""))
    told = {name: value for name, value in asdict(settings).items() if name not in FILES and value != usual[name]}
    # Wherever the files lie.
    content = {**told, **png_record.hashes(settings), **png_record.by_content(settings)}
    text = json.dumps({**content, "count": count, "models": models}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
