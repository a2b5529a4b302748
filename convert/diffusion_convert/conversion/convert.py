"""From a checkpoint to a folder of verified packages: what happens, in which order.

open -> plan -> for each unit: reference, export, measure, palettize, chunk -> put together -> rename into place
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffusion_convert.bundle import variants as bundle
from diffusion_convert.bundle.model_card import CARD_NAME, write_model_card
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.family import latent_factor, latent_scale
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.vocabulary import write_vocabulary
from diffusion_convert.conversion import previous as earlier
from diffusion_convert.conversion import unit as making
from diffusion_convert.conversion.plan import Plan, fingerprint, make_plan, tool_versions
from diffusion_convert.conversion.unit import read_record
from diffusion_convert.conversion.workspace import (
    Workspace,
    check_place,
    check_space,
    link_tree,
    publish,
    workspace,
)
from diffusion_convert.options import ConvertOptions
from diffusion_runtime import strict_json
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES, AttentionKind
from diffusion_runtime.schedulers import imposed_on, settled


@dataclass(frozen=True, slots=True)
class Event:
    """``phase`` of a ``unit`` ("unet-original"; "" for the whole) is done to ``fraction``, from 0 to 1."""

    unit: str
    phase: str
    fraction: float


Progress = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did: all that is in the output now. ``unchanged``: all of it was there already."""

    output: Path
    family: str
    variants: Mapping[str, Manifest]
    seconds: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()
    unchanged: bool = False


def convert(source: str, output: Path, options: ConvertOptions, progress: Progress) -> Conversion:
    """See `diffusion_convert.convert`."""
    check_place(output)
    earlier.check_variants(output)
    progress(Event("", "open", 0.0))
    checkpoint = open_checkpoint(
        source,
        revision=options.revision,
        family=options.family,
        vae=options.vae,
        loras=options.loras,
        lora_partial=options.lora_partial,
    )
    with torch_networks.silent():
        places = _places(source, options)
        options = earlier.widened(options, output, fingerprint(checkpoint, options, places))
        plan = make_plan(checkpoint, options, places)
    _manifest(plan, options.attention[0], {})  # what no runtime could use is refused before any work
    plan = replace(plan, notes=(*plan.notes, *earlier.replaced_note(plan, output)))
    for line in (f"family {FAMILIES[checkpoint.family].title}", *(f"note: {note}" for note in plan.notes)):
        progress(Event("", line, 0.0))
    there = earlier.already_there(plan, output)
    if there:
        return Conversion(output, checkpoint.family, there, {}, plan.notes, unchanged=True)
    check_space(output, plan.size_bytes)
    with workspace(output, plan.fingerprint, plan.result) as place, _libraries_settled():
        if not place.ready.exists():
            earlier.keep_finished(plan, place)
            for number, unit in enumerate(plan.units):
                progress(Event("", "components", number / len(plan.units)))
                making.make(unit, plan, place.units, place.references, partial(_report, progress, unit.name))
            _put_together(plan, place, progress)
        records = {unit.name: read_record(place.units / unit.name) for unit in plan.units}
        publish(place, earlier.obsolete(plan, place))
    made = {kind.value: manifest.read(output / kind.value / "packages") for kind in options.attention}
    done = {name: record for name, record in records.items() if record is not None}
    return Conversion(
        output,
        checkpoint.family,
        made,
        {name: record.seconds for name, record in done.items()},
        (*plan.notes, *dict.fromkeys(note for record in done.values() for note in record.notes)),
    )


@contextmanager
def _libraries_settled() -> Iterator[None]:
    """In this context, the garbage collector passes over what the libraries hold: a million objects that live as
    long as the process. A conversion collects dozens of times, and would look at all of them each time."""
    import_coremltools()
    if gc.get_freeze_count():  # by the program that calls us, whose choice it is
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _report(progress: Progress, unit: str, phase: str, fraction: float) -> None:
    progress(Event(unit, phase, fraction))


def _places(source: str, options: ConvertOptions) -> tuple[Path, ...]:
    named = [Path(source), *([Path(options.vae)] if options.vae else []), *(lora.path for lora in options.loras)]
    return tuple(path for place in named if (path := place.expanduser()).exists())


def _put_together(plan: Plan, place: Workspace, progress: Progress) -> None:
    """Make the folder of every variant from the units, and declare the result ready."""
    shutil.rmtree(place.staged, ignore_errors=True)
    for kind in plan.options.attention:
        _variant(plan, place, kind, place.staged / kind.value / "packages")
    if plan.compiled:
        _compile(plan, place, progress)
    progress(Event("", "finish", 1.0))
    place.staged.rename(place.ready)


def _compile(plan: Plan, place: Workspace, progress: Progress) -> None:

    for number, kind in enumerate(plan.options.attention):
        progress(Event("", f"compile {kind.value}", number / len(plan.options.attention)))
        variant = place.staged / kind.value
        bundle.compile_variant(variant / "packages", variant / "compiled")
    bundle.share_identical(place.staged)
    if plan.options.zip:
        progress(Event("", "zip", 0.0))
        bundle.zip_variants(place.staged)
    if (
        earlier.variants(place.output) or not (place.output / CARD_NAME).exists()
    ):  # else somebody else's: theirs it stays
        write_model_card(place.staged)


def _variant(plan: Plan, place: Workspace, kind: AttentionKind, folder: Path) -> None:
    folder.mkdir(parents=True)
    entries = {}
    for unit in plan.variant(kind):
        record = read_record(place.units / unit.name)
        if record is None:
            raise InputError(f"{place.units / unit.name}: was removed while this conversion ran; run it again")
        entries[unit.component.name] = record.component.model_copy(
            update={"compute_units": unit.component.compute_units(kind)}
        )
        for name in record.component.files:
            link_tree(place.units / unit.name / name, folder / name)
    write_vocabulary(plan.checkpoint.tokenizer, folder)
    manifest.write(_manifest(plan, kind, entries), folder)


def _manifest(plan: Plan, kind: AttentionKind, entries: Mapping[str, manifest.Component]) -> Manifest:
    checkpoint, vae = plan.checkpoint, plan.checkpoint.models["vae"].config
    values = {
        "name": checkpoint.name,
        "family": checkpoint.family,
        "source": checkpoint.source,
        "kind": "packages",
        "attention": kind.value,
        "height": plan.shape.height,
        "width": plan.shape.width,
        "batch_size": plan.shape.batch_size,
        "target": plan.options.target,
        "latents": {
            "channels": int(vae["latent_channels"]),
            "factor": latent_factor(vae),
            "scale": latent_scale(vae),
            "shift": float(vae.get("shift_factor") or 0.0),
        },
        "prediction_type": str(checkpoint.schedulers["scheduler"].get("prediction_type", "epsilon")),
        "components": dict(entries),
        "scheduler": settled(checkpoint.schedulers["scheduler"], imposed_on(checkpoint.family)),
        "noise_scheduler": _optional(checkpoint.schedulers.get("low_res_scheduler")),
        "force_zeros_for_empty_prompt": bool(checkpoint.pipeline_config.get("force_zeros_for_empty_prompt", False)),
        "requires_safety_checker": bool(checkpoint.pipeline_config.get("requires_safety_checker", False)),
        "tools": {**tool_versions(), "conversion": plan.fingerprint},
    }
    return strict_json.as_model(Manifest, values, checkpoint.name, "a checkpoint that can be run", CheckpointError)


def _optional(config: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if config is None else dict(config)
