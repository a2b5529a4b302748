"""From a checkpoint to a folder of verified packages: what happens, in which order.

open -> plan -> for each part: reference, export, measure, palettize, chunk -> put together -> rename into place
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from diffusion_convert.bundle.variants import sweep_variants
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.assemble import assemble, describe, is_described
from diffusion_convert.conversion.events import Event, Phase, Progress
from diffusion_convert.conversion.garbage import new_garbage_only
from diffusion_convert.conversion.job import Record
from diffusion_convert.conversion.palettized import check_recipe
from diffusion_convert.conversion.part import make
from diffusion_convert.conversion.plan import Part, Plan, identify, make_plan, settled_batch_size
from diffusion_convert.conversion.previous import Kept, Previous, kept_of, read
from diffusion_convert.conversion.workspace import Workspace, check_space, clear, workspace
from diffusion_convert.export import export
from diffusion_convert.option_values import check_path
from diffusion_convert.options import ConvertOptions
from diffusion_convert.palettize.known import Known
from diffusion_runtime.atomic import check_writable, commit, locked, work
from diffusion_runtime.bundle.integrity import Hashes
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.families import FAMILIES


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did: all that is in the output now. ``unchanged``: all of it was there already."""

    output: Path
    family: str
    variants: Mapping[str, Manifest]
    seconds: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()
    unchanged: bool = False


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint to Core ML models, each verified against the checkpoint's own network.

    A run that fails or is stopped leaves the models in the folder as they were. The result is added to what was
    made there of the same source with the same options, and takes the place of anything else that a conversion made
    there. A conversion that was stopped goes on where it stopped.

    Args:
        source: a folder in diffusers' layout, a .safetensors, .ckpt or .gguf file, or the id of a repository on
            the Hugging Face Hub.
        output: the folder for the result.
        options: see `ConvertOptions`; None: the defaults.
        progress: is called with an `Event` whenever something is done.

    Returns:
        All that is in ``output`` now: a manifest by variant, seconds by model and phase, notes for the user.

    Raises:
        InputError: for options and paths that cannot be used.
        CheckpointError: for a source that is missing, damaged or of an unknown kind.
        UnsupportedError: for a network that is not covered.
        VerificationError: for a model that does not compute what its source computes.
        StorageError: for a disk that is full or must not be written to.
        HubError: for a connection that failed.
    """
    output, progress = Path(output), progress or (lambda _: None)
    check_path("", output)
    check_writable(output)
    with locked(output) as hidden:
        sweep_variants(output)
        previous, known = read(output), Hashes()
        with new_garbage_only():  # what is imported here is no garbage
            plan = _plan(str(source), options or ConvertOptions(), previous, progress)
        kept = kept_of(previous, plan, known)
        if (there := kept.complete(plan, known)) and is_described(plan, previous):
            clear(hidden)
            return Conversion(output, plan.checkpoint.family, there, {}, plan.notes, unchanged=True)
        check_space(output, plan.size_bytes)
        with workspace(hidden, plan.identity.name) as place:
            return _convert(plan, place, kept, known, output, progress)


def _plan(source: str, options: ConvertOptions, previous: Previous, progress: Progress) -> Plan:
    progress(Event("", Phase.OPEN, 0.0))
    checkpoint = open_checkpoint(source, options)
    checkpoint = replace(checkpoint, clip_skip=options.clip_skip)
    options = replace(
        options,
        attention=options.attention or FAMILIES[checkpoint.family].attention,
        batch_size=settled_batch_size(checkpoint, options),
    )
    with torch_networks.silent():
        identity = identify(checkpoint, options)
        plan = make_plan(checkpoint, previous.widened(options, identity), identity)
    describe(plan, plan.options.attention[0], {})  # what no runtime could use is refused before any work
    plan = replace(plan, notes=(*plan.notes, *previous.replaced_note(identity)))
    progress(Event("", Phase.FAMILY, 0.0, FAMILIES[checkpoint.family].title))
    _tell(plan.notes, progress)
    return plan


def _tell(notes: Iterable[str], progress: Progress) -> None:
    for note in notes:
        progress(Event("", Phase.NOTE, 0.0, note))


def _convert(
    plan: Plan, place: Workspace, kept: Kept, known: Hashes, output: Path, progress: Progress
) -> Conversion:
    if reused := kept.take(plan, place):
        _tell([f"of the earlier conversion to other bits, 16-bit packages are used: {', '.join(reused)}"], progress)
    with new_garbage_only():
        import_coremltools()
    with new_garbage_only():  # coremltools and all that it imports are made before, and not looked at
        records = _make(plan, place, known, progress)
    notes = dict.fromkeys(
        (*check_recipe(plan, records), *(note for record in records.values() for note in record.notes))
    )
    _tell(notes, progress)
    with work(output) as slot:
        new = slot / "new"
        made = assemble(plan, place, records, kept.previous, new, known, progress)
        commit(slot, kept.previous.obsolete({entry.name for entry in new.iterdir()}), [place.root.name])
    seconds = {name: record.seconds for name, record in records.items()}
    return Conversion(output, plan.checkpoint.family, made, seconds, (*plan.notes, *notes))


def _make(plan: Plan, place: Workspace, known: Hashes, progress: Progress) -> dict[str, Record]:
    records: dict[str, Record] = {}
    sharing = Counter(part.component.subfolder for part in plan.parts)
    palettes = Known()
    for number, part in enumerate(plan.order):
        progress(Event("", Phase.COMPONENTS, number / len(plan.parts)))
        like = next((other for other in plan.order if other.name in records and other.is_like(part)), None)
        records[part.name] = make(
            part,
            plan,
            place,
            known,
            _reporter(part, progress),
            like,
            palettes if sharing[part.component.subfolder] > 1 else None,
        )
    return {part.name: records[part.name] for part in plan.parts}


def _reporter(part: Part, progress: Progress) -> export.OnPhase:
    return lambda phase, fraction: progress(Event(part.name, Phase(phase), fraction))
