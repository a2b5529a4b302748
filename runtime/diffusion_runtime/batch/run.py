"""A batch from end to end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from diffusion_runtime.backends import resolve
from diffusion_runtime.batch import rows as tables
from diffusion_runtime.batch import tasks as planning
from diffusion_runtime.batch.places import Line, Place
from diffusion_runtime.batch.tasks import Answer, Plan, Task
from diffusion_runtime.batch.worker import Setup
from diffusion_runtime.bundle import find, manifest
from diffusion_runtime.bundle.without_manifest import Assumed
from diffusion_runtime.errors import InputError

DECIDING = ("dtype", "tokenizer", "prediction_type", "latent_scale", "check_safety")
"""The arguments of `load_pipeline` that change pictures."""


class Workers(Protocol):
    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]: ...


@dataclass(slots=True)
class Batch:
    """``run`` makes what ``plan`` has to do; each row's result is in results.jsonl before it is yielded."""

    plan: Plan
    place: Place
    workers: Workers
    answers: list[Answer] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return len(self.plan.failed) + sum(answer.error is not None for answer in self.answers)

    def run(self) -> Iterator[Answer]:
        self.place.write_results([*self.plan.done, *self.plan.failed])
        if self.plan.to_make:
            for answer in self.workers.run(self.plan.to_make):
                for line in answer.lines():
                    self.place.append(line)
                self.answers.append(answer)
                yield answer
        made = [line for answer in self.answers for line in answer.lines()]
        self.place.write_results(sorted([*self.plan.done, *self.plan.failed, *made], key=_order))


def setups(
    models: str,
    loading: Mapping[str, Any],
    place: str,
    threads: int,
    workers: int | None,
    units: str | None,
    devices: str | None,
) -> list[Setup]:
    """A setup for each worker. Several compute units or devices, with commas between them, are shared out: a worker
    on each, or ``workers`` of them in turn. Raises InputError for what contradicts itself."""
    if threads < 1 or (workers is not None and workers < 1):
        raise InputError("--workers and --threads: expected at least 1")
    kinds = (
        [{"compute_units": one} for one in _listed(units)] or [{"device": one} for one in _listed(devices)] or [{}]
    )
    if units and devices:
        raise InputError("--compute-units are Core ML's and --device the torch backend's: give one")
    for kind in kinds:
        if "compute_units" in kind:
            find.parse_units(kind["compute_units"])
    return [
        Setup(models, {**loading, **kinds[i % len(kinds)]}, place, threads) for i in range(workers or len(kinds))
    ]


def default_threads() -> int:
    """Of each worker, whatever their number: half of the cores."""
    return max(1, (os.cpu_count() or 1) // 2)


def prepare(
    prompts: Path,
    place: Place,
    defaults: Mapping[str, Any],
    count: int,
    setups: Sequence[Setup],
    ignored: Set[str] = frozenset(),
    redo: bool = False,
) -> Plan:
    """What there is to do. Raises InputError for a table, models or a place that cannot be used."""
    rows = tables.read(prompts, ignored, place.inputs)
    tasks, failed = planning.tasks_of(rows, defaults, count, identity(setups[0]))
    return planning.plan(tasks, failed, place, redo)


def identity(setup: Setup) -> str:
    """A hash of which models these are and how they are loaded: pictures of other models have another."""
    loading = setup.loading
    assumed = Assumed(loading.get("prediction_type"), loading.get("latent_scale"))
    units = loading.get("compute_units")
    backend = resolve(loading.get("backend", "auto"))
    found = find.find(
        Path(setup.models),
        backend=backend,
        compute_units=find.parse_units(units) if units else None,
        assumed=assumed,
    )
    described = found.folder / manifest.FILE_NAME
    if described.is_file():
        told = described.read_bytes()
    else:
        files = sorted(path for path in found.folder.rglob("*") if path.is_file())
        told = repr([(path.relative_to(found.folder).as_posix(), path.stat().st_size) for path in files]).encode()
    chosen = [(name, str(loading[name])) for name in DECIDING if loading.get(name) is not None]
    return hashlib.sha256(told + repr(chosen).encode()).hexdigest()


def _listed(text: str | None) -> list[str]:
    return [one.strip() for one in (text or "").split(",") if one.strip()]


def _order(line: Line) -> tuple[int, int, str]:
    file = line["file"] or ""
    return line["row"], len(file), file
