"""What a sweep has found: table.csv, table.json and plot.png."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.evaluate.measure import Row

CSV, JSON, PLOT = "table.csv", "table.json", "plot.png"
DIGITS = 6
COLUMNS = tuple(field.name for field in fields(Row))


def write(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> list[str]:
    """Write the table, and the plot where there are distances; the files' names. ``about`` is how it was measured.
    Raises StorageError for what the disk refuses."""
    table = [{name: _rounded(value) for name, value in asdict(row).items()} for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    with unfinished_file(folder / CSV) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8")
    with unfinished_file(folder / JSON) as unfinished:
        whole = json.dumps({**about, "rows": table}, indent=1, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(whole + "\n", encoding="utf-8")
    if all(row.frechet_distance is None for row in rows):
        (folder / PLOT).unlink(missing_ok=True)  # an earlier run's, with other pictures
        return [CSV, JSON]
    with unfinished_file(folder / PLOT) as unfinished:
        _plot(rows, about).savefig(unfinished, format="png", dpi=100)
    return [CSV, JSON, PLOT]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _plot(rows: Sequence[Row], about: Mapping[str, Any]) -> Figure:
    """The model cards' plot: a curve for each set of models, a point for each guidance scale."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.models for row in rows):
        curve = [
            (row.clip_score, row.frechet_distance, row.guidance_scale)
            for row in rows
            if row.models == name and row.clip_score is not None and row.frechet_distance is not None
        ]
        if not curve:  # the models that the others are compared with
            continue
        axes.plot([x for x, _, _ in curve], [y for _, y, _ in curve], "o-", markersize=4, label=name)
        for x, y, scale in curve:
            axes.annotate(f"{scale:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(
        xlabel="CLIP score",
        ylabel=f"Fréchet distance ({about['features']})",
        title=f"guidance scales, {about['steps']} {about['scheduler']} steps",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
