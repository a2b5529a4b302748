"""What an earlier conversion left in a folder: what of it is kept, what is made again, what makes way.

Whatever was made of the same source with the same options (`Plan.fingerprint`) stays: components and variants are
added to it. Anything else that a conversion made there is replaced, and named before.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from diffusion_convert.bundle.model_card import CARD_NAME
from diffusion_convert.bundle.zip_names import zip_attentions, zip_name, zip_names
from diffusion_convert.conversion.plan import Plan, Unit
from diffusion_convert.conversion.unit import RECORD, Record, read_record
from diffusion_convert.conversion.workspace import Workspace, link_tree, ready_folders
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.atomic import unfinished_folder
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import check_files
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import ATTENTIONS, AttentionKind
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES

KINDS = ("packages", "compiled")


def check_variants(output: Path) -> None:
    """Raises InputError where the result would take the place of folders that no conversion has made."""
    ours = variants(output)
    for name in ATTENTIONS:
        folder = output / name
        if folder.exists() and name not in ours and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder}: is there, and no conversion made it; name another folder for the result")


def variants(output: Path) -> dict[str, Path]:
    """The variants of an earlier conversion in ``output``, by attention."""
    return {
        name: output / name
        for name in ATTENTIONS
        if any((output / name / kind / manifest.FILE_NAME).is_file() for kind in KINDS)
    }


def widened(options: ConvertOptions, output: Path, fingerprint: str) -> ConvertOptions:
    """The options with the variants and components that are in ``output`` and of the same fingerprint."""
    found = {
        name: made
        for place in (output, *ready_folders(output, fingerprint))
        for name, made in _manifests(place)
        if made is not None and made.tools.get("conversion") == fingerprint
    }
    there = dict.fromkeys(component for made in found.values() for component in made.components)
    return replace(
        options,
        attention=tuple(kind for kind in AttentionKind if kind in options.attention or kind.value in found),
        components=tuple(dict.fromkeys((*options.components, *there))) if options.components else (),
    )


def replaced_note(plan: Plan, output: Path) -> tuple[str, ...]:
    """What in ``output`` makes way, as a sentence; nothing where nothing does."""
    gone = [
        f"{name} ({', '.join(made.components)})" if made is not None else name
        for name, made in _manifests(output)
        if made is None or made.tools.get("conversion") != plan.fingerprint
    ]
    what = "made of another source or with other options or versions"
    return (f"replaces what is in {output}, {what}: {', '.join(gone)}",) if gone else ()


def already_there(plan: Plan, output: Path) -> dict[str, Manifest]:
    """The variants in ``output``, where they are those of the plan and whole; else nothing."""
    found = {}
    for attention in plan.options.attention:
        try:
            made = [
                _checked(plan, attention, output / attention.value / kind) for kind in KINDS[: 1 + plan.compiled]
            ]
        except PackageError:
            return {}
        if not plan.compiled and (output / attention.value / KINDS[1]).exists():
            return {}
        for path in _zips(plan, attention, made[0], output):
            if zipfile.is_zipfile(path) if plan.compiled and plan.options.zip else not path.exists():
                continue
            return {}
        found[attention.value] = made[0]
    return found


def _checked(plan: Plan, attention: AttentionKind, folder: Path) -> Manifest:
    """The manifest of a folder of models. Raises PackageError unless they are the plan's and as they were made."""
    made = manifest.read(folder)
    wanted = {unit.component.name for unit in plan.variant(attention)}
    if made.tools.get("conversion") != plan.fingerprint or made.components.keys() != wanted:
        raise PackageError(f"{folder}: made with other options")
    if not all((folder / name).is_file() for name in VOCABULARY_FILES):
        raise PackageError(f"{folder}: without its vocabulary")
    check_files(made, folder)
    return made


def _zips(plan: Plan, attention: AttentionKind, made: Manifest, output: Path) -> tuple[Path, ...]:
    kinds = {kind.value for kind in plan.options.attention}
    return tuple(output / name for name in zip_names(made, attention.value, kinds))


def keep_finished(plan: Plan, place: Workspace) -> None:
    """Make units of the components in the output that are of the plan's fingerprint and as they were made."""
    for unit in plan.units:
        folder = place.units / unit.name
        if read_record(folder) is not None or (found := _finished(unit, plan, place.output)) is None:
            continue
        packages, component = found
        with unfinished_folder(folder) as unfinished:
            for name in component.files:
                link_tree(packages / name, unfinished / name)
            text = Record(component=component).model_dump_json(indent=2)
            (unfinished / RECORD).write_text(text + "\n", encoding="utf-8")


def _finished(unit: Unit, plan: Plan, output: Path) -> tuple[Path, manifest.Component] | None:
    for attention in plan.options.attention if unit.shared else (unit.attention,):
        packages = output / attention.value / KINDS[0]
        with suppress(PackageError):
            made = manifest.read(packages)
            component = made.components.get(unit.component.name)
            if component is None or made.tools.get("conversion") != plan.fingerprint:
                continue
            check_files(made.model_copy(update={"components": {unit.component.name: component}}), packages)
            return packages, component
    return None


def obsolete(plan: Plan, place: Workspace) -> tuple[Path, ...]:
    """Variants, zips and the card of an earlier conversion to the same folder that this one did not make."""

    old = variants(place.output)
    found = [folder for name, folder in old.items() if name not in {kind.value for kind in plan.options.attention}]
    for name, folder in old.items():
        for kind in KINDS:
            with suppress(PackageError):
                made = manifest.read(folder / kind)
                found += [place.output / zip_name(made, kept) for kept in zip_attentions(name, ())]
    found += [place.output / CARD_NAME] if old else []
    return tuple(path for path in found if not (place.ready / path.name).exists())


def _manifests(place: Path) -> Iterator[tuple[str, Manifest | None]]:
    """The variants in a folder with their manifests; None for a damaged one."""
    for name, folder in variants(place).items():
        made = None
        for kind in reversed(KINDS):
            with suppress(PackageError):
                made = manifest.read(folder / kind)
        yield name, made
