"""A component that is being converted, and what is known of it when it is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from diffusion_convert.conversion.plan import Part, Plan
from diffusion_convert.export import export
from diffusion_convert.export.placeholders import FLOAT16_MAX
from diffusion_convert.layouts import LAYOUTS
from diffusion_convert.options import Precision
from diffusion_convert.palettize.known import Known
from diffusion_convert.verification import compare
from diffusion_convert.verification.known_runs import KnownRuns
from diffusion_runtime import strict_json
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import Hashes
from diffusion_runtime.errors import PackageError

RECORD = "record.json"


class Record(BaseModel):
    """What is known of a finished part: its entry in the manifest, seconds by phase, notes for the user."""

    model_config = ConfigDict(frozen=True)
    component: manifest.Component
    seconds: dict[str, float] = {}
    notes: tuple[str, ...] = ()

    def and_seconds(self, phase: str, more: float) -> Record:
        """The record with so many seconds more of that phase."""
        return self.model_copy(update={"seconds": {**self.seconds, phase: self.seconds.get(phase, 0.0) + more}})


@dataclass(frozen=True, slots=True)
class Job:
    """``folder`` is where the packages go; ``expected`` is None where nothing is to be verified; ``like`` is the
    same for pictures of another size, if that was made before; ``palettes`` are those of parts with the same
    weights, where there are such parts; ``runs`` what those computed that differ in attention alone."""

    part: Part
    plan: Plan
    folder: Path
    expected: compare.Expected | None
    known: Hashes
    report: export.OnPhase
    like: Record | None = None
    palettes: Known | None = None
    runs: KnownRuns | None = None

    @property
    def float16_limit(self) -> float:
        """What no float16 value of the package may pass."""
        return FLOAT16_MAX if self.plan.options.precision is Precision.FLOAT16 else compare.NEAR_LIMIT

    @property
    def package(self) -> Path:
        plan, part = self.plan, self.part
        name = LAYOUTS[plan.options.layout].file_name
        return self.folder / (
            name(plan.checkpoint, part.component, part.attention, part.shape, plan.options) + ".mlpackage"
        )


def write_record(record: Record, folder: Path) -> None:
    """Say that the part in ``folder`` is finished."""
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Record | None:
    """The record of a finished part; None if it is not finished."""
    try:
        return strict_json.as_model(
            Record, strict_json.read(folder / RECORD, PackageError), str(folder), "a record", PackageError
        )
    except PackageError:
        return None
