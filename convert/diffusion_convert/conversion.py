"""From a checkpoint to a folder of verified packages: what happens, in which order.

open -> plan -> for each unit: reference, export, measure, palettize, chunk -> put together -> rename into place
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusion_convert import families, making, networks
from diffusion_convert.checkpoint import open_checkpoint
from diffusion_convert.making import read_record
from diffusion_convert.options import AttentionKind, ConvertOptions
from diffusion_convert.plan import Plan, make_plan, tool_versions
from diffusion_convert.vocabulary import write_vocabulary
from diffusion_convert.workspace import Workspace, check_place, check_space, link_tree, publish, workspace
from diffusion_runtime import manifest
from diffusion_runtime.bundle import ATTENTIONS
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.manifest import Manifest
from diffusion_runtime.quiet import import_coremltools

KINDS = ("packages", "compiled")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Event:
    """``phase`` of a ``unit`` ("unet-original"; "" for the whole) is done to ``fraction``, from 0 to 1."""

    unit: str
    phase: str
    fraction: float


Progress = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did. ``unchanged``: all of it was there already."""

    output: Path
    family: str
    variants: Mapping[str, Manifest]
    seconds: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()
    unchanged: bool = False


def convert(source: str, output: Path, options: ConvertOptions, progress: Progress) -> Conversion:
    """See `diffusion_convert.convert`."""
    check_place(output)
    _check_variants(output)
    progress(Event("", "open", 0.0))
    checkpoint = open_checkpoint(
        source, revision=options.revision, family=options.family, vae=options.vae, loras=options.loras
    )
    with networks.silent():
        plan = make_plan(checkpoint, options, _places(source, options))
    for line in (f"family {families.FAMILIES[checkpoint.family].title}", *(f"note: {note}" for note in plan.notes)):
        progress(Event("", line, 0.0))
    there = _already_there(plan, output)
    if there:
        return Conversion(output, checkpoint.family, there, {}, plan.notes, unchanged=True)
    check_space(output, plan.size_bytes)
    with workspace(output, plan.fingerprint) as place, _libraries_settled():
        if not place.ready.exists():
            for number, unit in enumerate(plan.units):
                progress(Event("", "components", number / len(plan.units)))
                making.make(unit, plan, place.units, place.references, partial(_report, progress, unit.name))
            _put_together(plan, place, progress)
        records = {unit.name: read_record(place.units / unit.name) for unit in plan.units}
        publish(place, _obsolete(plan, place))
    made = {kind.value: manifest.read(output / kind.value / "packages") for kind in options.attention}
    done = {name: record for name, record in records.items() if record is not None}
    return Conversion(
        output,
        checkpoint.family,
        made,
        {name: record.seconds for name, record in done.items()},
        (*plan.notes, *dict.fromkeys(note for record in done.values() for note in record.notes)),
    )


def _check_variants(output: Path) -> None:
    """Raises InputError where the result would take the place of folders that no conversion has made."""
    ours = _variants(output)
    for name in ATTENTIONS:
        folder = output / name
        if folder.exists() and name not in ours and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder}: is there, and no conversion made it; name another folder for the result")


def _variants(output: Path) -> dict[str, Path]:
    """The variants of an earlier conversion in ``output``, by attention."""
    return {
        name: output / name
        for name in ATTENTIONS
        if any((output / name / kind / manifest.FILE_NAME).is_file() for kind in KINDS)
    }


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


def _already_there(plan: Plan, output: Path) -> dict[str, Manifest]:
    """The variants in ``output``, where they are those of the plan and whole; else nothing."""
    from diffusion_convert.bundle import zip_name

    found = {}
    for attention in plan.options.attention:
        for kind in KINDS[: 1 + plan.compiled]:
            folder = output / attention.value / kind
            try:
                made = manifest.read(folder)
            except PackageError:
                return {}
            files = [folder / name for component in made.components.values() for name in component.sha256]
            if plan.compiled and plan.options.zip:
                files.append(output / zip_name(made, attention.value))
            if made.tools.get("conversion") != plan.fingerprint or not all(path.is_file() for path in files):
                return {}
        found[attention.value] = manifest.read(output / attention.value / KINDS[0])
    return found


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
    from diffusion_convert import bundle
    from diffusion_convert.model_card import CARD_NAME, write_model_card

    for number, kind in enumerate(plan.options.attention):
        progress(Event("", f"compile {kind.value}", number / len(plan.options.attention)))
        variant = place.staged / kind.value
        bundle.compile_variant(variant / "packages", variant / "compiled")
    bundle.share_identical(place.staged)
    if plan.options.zip:
        progress(Event("", "zip", 0.0))
        bundle.zip_variants(place.staged)
    if _variants(place.output) or not (place.output / CARD_NAME).exists():  # else somebody else's: theirs it stays
        write_model_card(place.staged)


def _variant(plan: Plan, place: Workspace, kind: AttentionKind, folder: Path) -> None:
    folder.mkdir(parents=True)
    entries = {}
    for unit in plan.variant(kind):
        record = read_record(place.units / unit.name)
        if record is None:
            raise InputError(f"{place.units / unit.name}: was removed while this conversion ran; run it again")
        units = unit.component.compute_units
        entries[unit.component.name] = record.component.model_copy(
            update={"compute_units": units.get(kind.value, units.get("default", "all"))}
        )
        for name in record.component.files:
            link_tree(place.units / unit.name / name, folder / name)
    write_vocabulary(plan.checkpoint.tokenizer, folder)
    for name in TOKENIZER_FILES:
        if name in plan.checkpoint.tokenizer:
            shutil.copyfile(plan.checkpoint.tokenizer[name], folder / name)
    manifest.write(_manifest(plan, kind, entries), folder)


def _manifest(plan: Plan, kind: AttentionKind, entries: Mapping[str, manifest.Component]) -> Manifest:
    checkpoint, vae = plan.checkpoint, plan.checkpoint.models["vae"].config
    return Manifest(
        name=checkpoint.name,
        family=checkpoint.family,
        source=checkpoint.source,
        kind="packages",
        attention=kind.value,
        height=plan.shape.height,
        width=plan.shape.width,
        batch_size=plan.shape.batch_size,
        target=plan.options.target,
        latents=manifest.Latents(
            channels=int(vae["latent_channels"]),
            factor=families.latent_factor(vae),
            scale=families.latent_scale(vae),
            shift=float(vae.get("shift_factor") or 0.0),
        ),
        prediction_type=str(checkpoint.schedulers["scheduler"].get("prediction_type", "epsilon")),
        components=dict(entries),
        scheduler=dict(checkpoint.schedulers["scheduler"]),
        noise_scheduler=_optional(checkpoint.schedulers.get("low_res_scheduler")),
        force_zeros_for_empty_prompt=bool(checkpoint.pipeline_config.get("force_zeros_for_empty_prompt", False)),
        requires_safety_checker=bool(checkpoint.pipeline_config.get("requires_safety_checker", False)),
        tools={**tool_versions(), "conversion": plan.fingerprint},
    )


def _optional(config: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if config is None else dict(config)


def _obsolete(plan: Plan, place: Workspace) -> tuple[Path, ...]:
    """Variants, zips and the card of an earlier conversion to the same folder that this one did not make."""
    from diffusion_convert.bundle import zip_name
    from diffusion_convert.model_card import CARD_NAME

    old = _variants(place.output)
    found = [folder for name, folder in old.items() if name not in {kind.value for kind in plan.options.attention}]
    for name, folder in old.items():
        for kind in KINDS:
            with suppress(PackageError):
                made = manifest.read(folder / kind)
                found += [place.output / zip_name(made, kept) for kept in {name, name.removesuffix("_v2")}]
    found += [place.output / CARD_NAME] if old else []
    return tuple(path for path in found if not (place.ready / path.name).exists())
