"""Parts for pictures of several sizes, put together and taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_convert.conversion.job import Record
from diffusion_convert.conversion.plan import Part, Plan, joins_sizes
from diffusion_convert.conversion.workspace import Workspace
from diffusion_convert.join import join, share, take_apart
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import Hashes, measured
from diffusion_runtime.links import share_tree
from diffusion_runtime.picture_size import Size


def put_together(
    parts: Sequence[Part],
    plan: Plan,
    place: Workspace,
    records: Mapping[str, Record],
    folder: Path,
    known: Hashes,
) -> manifest.Component:
    """Put a component into ``folder``, whose ``parts`` are for one size each; return its entry in the manifest.

    Several sizes become functions of one package; for older targets they stay packages of their own, the first
    size's in ``folder`` and the others' in a folder of their size, with one weight file."""
    first = records[parts[0].name].component
    if len(parts) == 1:
        for name in first.files:
            share_tree(place.part(parts[0].name) / name, folder / name)
        return first
    joins = joins_sizes(plan.options.target)
    sizes = {}
    for part in parts:
        component = records[part.name].component
        update: dict[str, object] = {"sha256": {}, "size_bytes": 0}
        if joins and part.size is not None:
            update["function"] = part.size.function
        elif part is not parts[0]:
            update["files"] = tuple(f"{part.size}/{name}" for name in component.files)
        sizes[str(part.size)] = component.model_copy(update=update)
    for number, name in enumerate(first.files):
        sources = [place.part(part.name) / records[part.name].component.files[number] for part in parts]
        if joins:
            functions = [part.size.function for part in parts if part.size is not None]
            join(dict(zip(functions, sources, strict=True)), folder / name, known)
        else:
            share(sources, [folder / one.files[number] for one in sizes.values()], known)
    files = tuple(dict.fromkeys(name for one in sizes.values() for name in one.files))
    return first.model_copy(update={**measured(folder, files, known), "sizes": sizes})


def take_size(component: manifest.Component, size: Size, packages: Path, folder: Path) -> manifest.Component:
    """Put a component for one ``size`` of several (`manifest.Component.at`), whose files are in ``packages``, into
    ``folder`` as a part; return the part's entry."""
    names = [file.removeprefix(f"{size}/") for file in component.files]
    for file, name in zip(component.files, names, strict=True):
        if component.function is None:
            share_tree(packages / file, folder / name)
        else:
            take_apart(packages / file, component.function, folder / name)
    told = {**measured(folder, names), "files": tuple(names), "function": None, "sizes": {}}
    return component.model_copy(update=told)
