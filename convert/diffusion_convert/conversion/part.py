"""One component, from the checkpoint to finished packages: converted, measured, palettized, cut in two."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.chunk import chunk
from diffusion_convert.conversion.job import Job, Record, read_record, write_record
from diffusion_convert.conversion.metadata import metadata
from diffusion_convert.conversion.palettized import palettize
from diffusion_convert.conversion.plan import Part, Plan
from diffusion_convert.conversion.workspace import Workspace
from diffusion_convert.export import export
from diffusion_convert.options import Precision
from diffusion_convert.palettize.known import Known
from diffusion_convert.palettize.outputs import Samples
from diffusion_convert.verification import compare
from diffusion_convert.verification.known_runs import UNREADABLE, KnownRuns
from diffusion_runtime.atomic import unfinished_folder
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import Hashes, measured
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.families import CHUNKED, T5, TEXT_ENCODERS
from diffusion_runtime.links import share_file, share_tree

MAX_ATTEMPTS = 5
"""How often a component is converted anew with more operations in float32, until none overflows."""
MIN_CHAIN_PSNR_DB = 80.0
"""Two halves against the whole: the same operations, so all that may differ is how torch sums."""


def make(
    part: Part,
    plan: Plan,
    place: Workspace,
    known: Hashes,
    report: export.OnPhase,
    like: Part | None = None,
    palettes: Known | None = None,
) -> Record:
    """Make the folder of a part, unless it exists. A run that is stopped leaves no partial folder. ``like`` is the
    same part for pictures of another size, if that was made before: equal files become one on disk.

    Raises VerificationError where the package does not compute what the checkpoint's own network computes."""
    kept = read_record(place.part(part.name))
    if kept is not None:
        return kept
    whole = read_record(place.whole(part.name))
    expected = None
    if plan.options.verify and whole is None:
        expected = _reference(part, plan, place.references, report)
    elif plan.options.verify:  # it was verified when it was made: what is left is to compare with it
        expected = compare.Expected(compare.draw(part.component, plan.checkpoint, part.shape), ())
    with unfinished_folder(place.part(part.name)) as folder:
        other = None if like is None else read_record(place.part(like.name))
        job = Job(part, plan, folder, expected, known, report, other, palettes, _runs(part, plan, place.references))
        record, outputs = _convert(job) if whole is None else (_copied(job, place.whole(part.name), whole), None)
        record = _hashed(job, _cut(job, palettize(job, record, outputs)))
        if like is not None and other is not None:
            _share_equal(place.part(like.name), other, folder, record)
        write_record(record, folder)
    return record


def _reference(part: Part, plan: Plan, references: Path, report: export.OnPhase) -> compare.Expected:
    """What the checkpoint's own network computes, from disk if another variant has asked."""
    path = references / f"{part.any_attention}.npz"
    with suppress(*UNREADABLE):
        return compare.Expected.load(path)
    report("reference", 0.0)
    compare.reference(part.component, plan.checkpoint, part.shape, partial(report, "reference")).save(path)
    gc.collect()  # networks are cycles, and hold files mapped
    return compare.Expected.load(path)


def _runs(part: Part, plan: Plan, references: Path) -> KnownRuns | None:
    """Where is kept what the part's package computes, for other attentions'; None where there are none."""
    kinds = [other for other in plan.parts if other.any_attention == part.any_attention]
    return KnownRuns(references / f"{part.any_attention}-runs") if len(kinds) > 1 and plan.options.verify else None


def _copied(job: Job, folder: Path, whole: Record) -> Record:
    """A 16-bit package that was there already, as a hard link, in place of one that is converted."""
    (name,) = whole.component.files
    share_tree(folder / name, job.package)
    component = whole.component.model_copy(update={"files": (job.package.name,)})
    return whole.model_copy(update={"component": component})


def _convert(job: Job) -> tuple[Record, Samples | None]:
    """Write the package, and tell what it computes of the reference's inputs, where it is verified. Where float16
    has no room for an operation's values, it is converted anew with that operation in float32."""
    part, options = job.part, job.plan.options
    export_options = export.ExportOptions(part.attention, part.shape, options.target, options.precision)
    seconds: dict[str, float] = {}
    for _ in range(MAX_ATTEMPTS):
        made = export.export(
            part.component,
            job.plan.checkpoint,
            export_options,
            job.package,
            metadata(job.part.component, job.plan),
            job.report,
        )
        gc.collect()  # so are coremltools' programs
        _add(seconds, made.seconds)
        _refuse_wide_weights(job, made)
        if job.expected is None:
            return _record(job, made, export_options, {}, seconds), None
        started = time.perf_counter()
        verdict = compare.measure(job.package, job.expected, partial(job.report, "verify"), job.runs)
        gc.collect()  # so is the package's program: its weights stay mapped beside the next network's
        compare.check(part.component, job.package, verdict, partial(_explain, job, made, job.expected))
        _add(seconds, {"verify": time.perf_counter() - started})
        hot = compare.overflowing(job.package, verdict.largest, job.float16_limit)
        if not hot:
            return _record(job, made, export_options, verdict.psnr_db, seconds), verdict.outputs
        if options.precision is Precision.FLOAT16:
            raise VerificationError(
                f"{part.component.name}: float16 overflows at {_listed(hot, made.modules)}; use --precision auto"
            )
        export_options = _widened(export_options, hot, made.modules)
    raise VerificationError(
        f"{part.component.name}: float16 still overflows at {_listed(hot, made.modules)} after {MAX_ATTEMPTS} "
        "attempts to keep that in float32; use --precision float32"
    )


def _widened(
    export_options: export.ExportOptions, hot: Mapping[str, float], modules: Mapping[str, str]
) -> export.ExportOptions:
    """The options with those operations in float32; what was in float32 already and yet comes out as float16, with
    its whole torch module."""
    names = {name: export.mil_name(name) for name in hot}
    again = {modules.get(name, "") for name in hot if names[name] in export_options.float32_ops} - {""}
    return replace(
        export_options,
        float32_ops=export_options.float32_ops | set(names.values()),
        float32_modules=export_options.float32_modules | again,
    )


def _refuse_wide_weights(job: Job, made: export.Exported) -> None:
    if made.float32_weights and job.plan.options.precision is Precision.FLOAT16:
        raise VerificationError(
            f"{job.part.component.name}: weights are beyond float16: "
            f"{torch_networks.listed(list(made.float32_weights))}; use --precision auto"
        )


def _listed(hot: Mapping[str, float], modules: Mapping[str, str]) -> str:
    return torch_networks.listed(
        [f"{name} ({size:.3g}, torch module {modules.get(name) or 'the whole'})" for name, size in hot.items()]
    )


def _explain(job: Job, made: export.Exported, expected: compare.Expected) -> str:
    graph = job.part.component.build(job.plan.checkpoint, job.part.attention, job.part.shape)
    return compare.first_divergence(job.package, graph.module, made.modules, expected.inputs[0])


def _record(
    job: Job,
    made: export.Exported,
    export_options: export.ExportOptions,
    psnr_db: Mapping[str, float],
    seconds: Mapping[str, float],
) -> Record:
    kept = [name for name in made.modules if export.mil_name(name) in export_options.float32_ops]
    return Record(
        component=manifest.Component(
            files=(job.package.name,),
            inputs=tuple(
                manifest.Tensor(name=p.name, dtype=p.dtype, shape=p.shape, shapes=p.shapes) for p in made.inputs
            ),
            outputs=tuple(manifest.Tensor(name=p.name, dtype=p.dtype, shape=p.shape) for p in made.outputs),
            compute_units=job.part.component.compute_units(job.part.attention),
            precision=made.precision,
            float32_ops=tuple(kept),
            psnr_db=dict(psnr_db),
            vocabulary_size=_vocabulary_size(job),
        ),
        seconds=dict(seconds),
        notes=_notes(job, made, kept),
    )


def _vocabulary_size(job: Job) -> int | None:
    component = job.part.component
    if component.name not in (*TEXT_ENCODERS, T5):
        return None
    return int(job.plan.checkpoint.models[component.subfolder].config["vocab_size"])


def _notes(job: Job, made: export.Exported, kept: list[str]) -> tuple[str, ...]:
    notes = []
    if kept:
        modules = torch_networks.listed(list(dict.fromkeys(made.modules[name] or "the whole" for name in kept)))
        notes.append(
            f"{job.part.name}: {len(kept)} operations stay in float32, as their values come near float16's limit: "
            f"{torch_networks.listed(kept)} (torch modules {modules})"
        )
    if made.float32_weights:
        wide = torch_networks.listed(list(made.float32_weights))
        notes.append(f"{job.part.name}: weights beyond float16 stay in float32: {wide}")
    return tuple(notes)


def _cut(job: Job, record: Record) -> Record:
    """Two packages in place of a UNet, checked to compute the same one after the other."""
    if not (job.plan.options.chunk_unet and job.part.component.name in CHUNKED):
        return record
    job.report("cut", 0.0)
    started = time.perf_counter()
    whole = job.package
    halves = tuple(whole.with_name(f"{whole.stem}_chunk{number}.mlpackage") for number in (1, 2))
    chunk(whole, *halves)
    if job.expected is not None:
        _check_chain(whole, halves, job.expected.inputs[0])
    shutil.rmtree(whole)
    return record.model_copy(
        update={
            "component": record.component.model_copy(update={"files": tuple(path.name for path in halves)}),
            "seconds": {**record.seconds, "cut": time.perf_counter() - started},
        }
    )


def _check_chain(whole: Path, halves: tuple[Path, ...], inputs: Mapping[str, np.ndarray]) -> None:
    from diffusion_runtime.backends.torch_mil import TorchBackend

    backend = TorchBackend(stream_weights=True)
    expected = backend.load(whole)(**inputs)
    arrays = dict(inputs)
    for path in halves:
        model = backend.load(path)
        arrays |= model(**{name: arrays[name] for name in model.inputs})
    quality = {name: compare.psnr_db(array, arrays[name]) for name, array in expected.items()}
    low = {name: value for name, value in quality.items() if not value >= MIN_CHAIN_PSNR_DB}
    if low:
        raise VerificationError(
            f"{whole.name}: its halves, run one after the other, differ from the whole: "
            + ", ".join(f"{name} {value:.1f} dB" for name, value in low.items())
        )


def _hashed(job: Job, record: Record) -> Record:
    component = record.component
    component = component.model_copy(update=measured(job.folder, component.files, job.known))
    return record.model_copy(update={"component": component})


def _share_equal(source: Path, other: Record, folder: Path, record: Record) -> None:
    """Make files of the unfinished ``folder`` that are equal to those in ``source`` hard links to them."""
    for name, digest in record.component.sha256.items():
        if other.component.sha256.get(name) == digest:
            share_file(source / name, folder / name)


def _add(total: dict[str, float], seconds: Mapping[str, float]) -> None:
    for phase, value in seconds.items():
        total[phase] = total.get(phase, 0.0) + value
