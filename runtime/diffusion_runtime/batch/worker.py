"""One worker: loads the models once and makes one row after the other."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_runtime import generation
from diffusion_runtime.batch.places import open_place
from diffusion_runtime.batch.tasks import KEY, Answer, Task
from diffusion_runtime.errors import DiffusionError, StorageError
from diffusion_runtime.schedulers import canonical

if TYPE_CHECKING:
    from diffusion_runtime.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to know: the models, `load_pipeline`'s other arguments, where pictures go, and how many
    threads it computes with. Sums are rounded otherwise with other numbers of threads: all workers have as many."""

    models: str
    loading: Mapping[str, Any]
    place: str
    threads: int


class Worker:
    """The models of a setup, loaded. Raises DiffusionError for models that cannot be used."""

    def __init__(self, setup: Setup) -> None:
        import torch

        from diffusion_runtime.loading import load_pipeline

        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.place = open_place(setup.place)
        self.pipeline: Pipeline = load_pipeline(setup.models, **setup.loading)

    def make(self, task: Task, alive: Callable[[], None] = lambda: None) -> Answer:
        """The pictures of a task, written. ``alive`` is called at every step. Raises StorageError where nothing can
        be written; whatever else goes wrong is the answer's ``error``."""
        start = time.monotonic()
        try:
            flagged = self._make(task, alive)
        except StorageError:
            raise
        except DiffusionError as error:
            return Answer(task, error=" ".join(str(error).split()))
        except Exception as error:  # a bug of ours must not end the other rows; its traceback is what we need
            traceback.print_exc(file=sys.stderr)
            return Answer(task, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return Answer(task, flagged, time.monotonic() - start)

    def _make(self, task: Task, alive: Callable[[], None]) -> tuple[bool, ...]:
        told = {field.name: getattr(task.settings, field.name) for field in fields(task.settings)}
        options = {name: value for name, value in told.items() if value is not None}
        with self.place.writing(f"{task.number:06}") as folder:
            order = generation.order(
                Path(self.setup.models),
                options,
                loading=self.setup.loading,
                count=task.count,
                output=folder / task.name,
                extra={KEY: task.key},
            )
            name = task.settings.scheduler
            self.pipeline.scheduler_name = None if name is None else canonical(name)
            return tuple(made.flagged for made in generation.make(self.pipeline, order, lambda *_: alive()))
