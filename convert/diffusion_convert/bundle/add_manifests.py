"""Folders that other tools made, taken over as bundles: their models get a manifest and a variant's place.

Taken are what Apple's converter writes (packages, and Resources/ of compiled models) and repositories of the Hub
({attention}/{packages,compiled}/). What no interface tells is assumed as the runtime does, and said.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from diffusion_convert.conversion.workspace import link_tree
from diffusion_convert.inspect import palettized_weights
from diffusion_runtime.bundle import manifest, without_manifest
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import hashes, size_bytes
from diffusion_runtime.bundle.manifest import Manifest, Palettization
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import ATTENTIONS, SYSTEMS, compiled_names
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES


def add_manifests(
    folder: Path, assumed: without_manifest.Assumed, name: str | None, report: Callable[[str], None]
) -> None:
    """Write a manifest for all models below ``folder`` that have none; those that lie in no variant's place are
    linked to one. ``name`` is the checkpoint's, else as their files say.

    Raises InputError for models that this version does not cover, or where the tokenizer's files are nowhere.
    """
    for place, attention, kind in _found(folder):
        described = describe(place, assumed)
        chosen = attention or described.manifest.attention
        target = folder / chosen / kind
        tokenizer = described.tokenizer or _beside(folder, target)
        if tokenizer is None:
            raise InputError(
                f"{place}: no vocab.json and merges.txt, which apps need: copy them there from the checkpoint's "
                "tokenizer"
            )
        if target != place:
            _link(described.manifest, place, target)
        for file in VOCABULARY_FILES:
            if not (target / file).exists():
                shutil.copyfile(tokenizer / file, target / file)
        made = _completed(described.manifest, target, chosen, kind)
        title = name or _name(made, place, folder, target)
        made = made.model_copy(update={"name": title, "source": made.source.model_copy(update={"name": title})})
        manifest.write(made, target)
        for note in described.notes:
            report(note)


def describe(place: Path, assumed: without_manifest.Assumed) -> without_manifest.Described:
    """What the runtime makes out of models without a manifest, with their target and palettized weights."""
    described = without_manifest.describe(place, assumed)
    components, versions = {}, []
    for name, component in described.manifest.components.items():
        models = [open_package(place / file).model for file in component.files]
        versions += [model.specification_version for model in models]
        components[name] = component.model_copy(update={"palettization": _palettization(models)})
    target = SYSTEMS[max(versions)].macos if max(versions) in SYSTEMS else "unknown"
    return replace(
        described, manifest=described.manifest.model_copy(update={"components": components, "target": target})
    )


def _found(folder: Path) -> Iterator[tuple[Path, str | None, str]]:
    """Where models without a manifest lie, the attention and kind that the place tells; packages come first."""
    for attention in ATTENTIONS:
        for kind in KINDS:
            if _lacks_manifest(folder / attention / kind):
                yield folder / attention / kind, attention, kind
    if any((folder / attention).is_dir() for attention in ATTENTIONS):
        return
    for place in (folder, folder / "packages", folder / "compiled", folder / "Resources"):
        if _lacks_manifest(place):
            names = (compiled_names("unet", count)[0] for count in (1, 2))
            compiled = any((place / f"{name}.mlmodelc").is_dir() for name in names)
            yield place, None, KINDS[int(compiled)]


def _name(made: Manifest, place: Path, folder: Path, target: Path) -> str:
    """The checkpoint's name as packages have it; compiled models that lie beside none have the whole folder's."""
    packages = target.parent / "packages"
    if target != packages and (packages / manifest.FILE_NAME).is_file():
        return manifest.read(packages).name
    return folder.resolve().name if made.name == place.name else made.name


def _lacks_manifest(place: Path) -> bool:
    return not (place / manifest.FILE_NAME).is_file() and without_manifest.holds_unet(place)


def _beside(folder: Path, target: Path) -> Path | None:
    """The tokenizer's files beside another kind of the same variant, or in the whole folder."""
    places = (*(target.parent / kind for kind in KINDS), folder, folder / "Resources", folder / "tokenizer")
    return next((place for place in places if all((place / file).is_file() for file in VOCABULARY_FILES)), None)


def _link(made: Manifest, place: Path, target: Path) -> None:
    if target.exists():
        raise InputError(f"{target}: is in the way of the models of {place}; remove it")
    target.mkdir(parents=True)
    for component in made.components.values():
        for file in component.files:
            link_tree(place / file, target / file)


def _completed(made: Manifest, target: Path, attention: str, kind: str) -> Manifest:
    components = {
        name: component.model_copy(
            update={
                "sha256": hashes(target, component.files),
                "size_bytes": size_bytes(target, component.files),
            }
        )
        for name, component in made.components.items()
    }
    return made.model_copy(
        update={
            "kind": kind,
            "attention": attention,
            "components": components,
            "tokenizer": ".",
            # Compiled models name no tools: what another compiler made is kept as it is (`bundle.is_current`).
            "tools": {"coreml-sd": version("coreml-sd")} if kind == "packages" else {},
        }
    )


def _palettization(models: list[Model]) -> Palettization | None:
    """The bits that most of the palettized weights have, if there are any."""
    counts: Counter[int] = Counter()
    for model in models:
        counts.update(palettized_weights(model.function))
    return Palettization(nbits=counts.most_common(1)[0][0]) if counts else None
