"""Reports as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from diffusion_convert.inspect import FolderReport, ModelReport, Port
from diffusion_runtime.picture_size import listed

_SHOWN_OPERATIONS = 12


def as_json(reports: Iterable[FolderReport]) -> str:
    """A list of folders; field names are those of the report classes, work has its total."""
    return json.dumps([_plain(report) for report in reports], indent=2, ensure_ascii=False)


def as_text(reports: Iterable[FolderReport]) -> str:
    """A paragraph per model."""
    return "\n\n".join("\n".join(_folder_lines(report)) for report in reports)


def _plain(report: FolderReport) -> dict[str, Any]:
    described = report.manifest.model_dump(mode="json", exclude_none=True) if report.manifest else None
    models = []
    for model in report.models:
        plain = dataclasses.asdict(model)
        plain["work"]["total"] = model.work.total
        models.append(plain)
    return {"name": report.name, "manifest": described, "models": models}


def _folder_lines(report: FolderReport) -> Iterator[str]:
    made = report.manifest
    if made is not None:
        yield (
            f"{report.name}: {made.name} ({made.family}), {made.attention}, {listed(made.sizes)}, "
            f"batch {made.batch_size}, {made.prediction_type} prediction, {made.layout.value} layout, for "
            f"{made.target} and later"
        )
        yield from (f"  folded    {line}" for line in made.folded.lines())
        yield from (f"  adapter   {one.name}: an IP-Adapter, {one.source}" for one in made.ip_adapters)
        yield from (f"  adapter   {name}: a T2I-Adapter, {one.name}" for name, one in made.t2i_adapters.items())
    elif len(report.models) > 1:
        yield f"{report.name}:"
    for index, model in enumerate(report.models):
        if index or made is not None:
            yield ""
        yield from _model_lines(model)


def _model_lines(model: ModelReport) -> Iterator[str]:
    yield f"{model.name}: specification {model.specification_version}, {model.opset}, for {model.target} and later"
    if model.functions:
        yield f"  functions {', '.join(function.name for function in model.functions)}; without a name the first"
    for function in model.functions[1:]:
        yield f"  {function.name}: {'; '.join(map(_port, (*function.inputs, *function.outputs)))}"
    for label, ports in (("in", model.inputs), ("out", model.outputs)):
        for port in ports:
            yield f"  {label:<10}{_port(port)}"
    yield f"  size      {_size(model.size_bytes)}, of which weights {_size(model.weight_bytes)}"
    yield f"  precision computes in {model.precision or 'unknown'}, stores {model.storage or 'no weights'}"
    if model.bits:
        kinds = ", ".join(f"{count} weights of {bits} bits" for bits, count in model.bits.items())
        yield f"  palettes  {kinds}"
    yield f"  attention {model.attention or 'none'}"
    parts = ", ".join(f"{kind} {_work(amount)}" for kind, amount in model.work.by_operation.items())
    unknown = f", {model.work.unknown} operations of unknown shape" if model.work.unknown else ""
    yield f"  work      {_work(model.work.total)} per call{f' ({parts})' if parts else ''}{unknown}"
    counts = [f"{kind} {count}" for kind, count in model.operations.items()]
    more = f" and {len(counts) - _SHOWN_OPERATIONS} more kinds" if len(counts) > _SHOWN_OPERATIONS else ""
    yield f"  ops       {', '.join(counts[:_SHOWN_OPERATIONS])}{more}"
    if model.inferred:
        yield f"  inferred  versions of {', '.join(model.inferred)}: how metadata.json counts them was never seen"
    if not model.obstacles:
        yield "  Neural Engine: nothing known stands in the way"
    for obstacle in model.obstacles:
        where = ", ".join(f"{kind} {count}" for kind, count in obstacle.operations.items())
        yield f"  not on the Neural Engine: {obstacle.reason}{f' [{where}]' if where else ''}"


def _port(port: Port) -> str:
    shape = "x".join(map(str, port.shape)) or "of no declared shape"
    flexible = f" (flexible: {port.flexible})" if port.flexible else ""
    return f"{port.name} {port.dtype} {shape}{flexible}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"


def _work(operations: int) -> str:
    """In billions of floating-point operations."""
    return f"{operations / 1e9:.3g} GFLOP"
