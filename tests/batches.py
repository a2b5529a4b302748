"""Batches in this process, and what they leave in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from diffusion_runtime.batch.tasks import Answer
from diffusion_runtime.batch.worker import Setup, Worker

Make = Callable[..., list[dict[str, Any]]]


class Here:
    """Workers of this process, one after the other: what a row becomes does not need processes."""

    def __init__(self, of: list[Setup]) -> None:
        self.setups = of

    def run(self, tasks: Any) -> Iterator[Answer]:
        worker = Worker(self.setups[0])
        yield from map(worker.make, tasks)


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    """A table in the format that the name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in table for name in row))
        lines = [",".join(names), *(",".join(f'"{row.get(name, "")}"' for name in names) for row in table)]
        path.write_text("\n".join(lines))
    else:
        path.write_text("\n".join(row["prompt"] for row in table))
    return path


def results(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


def pictures(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.glob("*.png")}


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
