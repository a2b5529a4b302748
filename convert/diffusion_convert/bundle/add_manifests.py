"""Folders that other tools made, taken over as bundles: their models get a manifest and a variant's place.

Taken are what Apple's converter writes (packages, and Resources/ of compiled models) and repositories of the Hub
({attention}/{packages,compiled}/). What no interface tells is assumed as the runtime does, and said.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from diffusion_convert.checkpoint.vocabulary import TOKENIZER_FILES, write_vocabulary
from diffusion_convert.inspect import palettized_weights
from diffusion_runtime.atomic import unfinished_file, unfinished_folder
from diffusion_runtime.bundle import manifest, without_manifest
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import Hashes, measured, tokenizer_hashes
from diffusion_runtime.bundle.manifest import Manifest, Palettization
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import ATTENTIONS, SYSTEMS, UNETS, compiled_names
from diffusion_runtime.links import share_tree
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES
from diffusion_runtime.real_path import is_inside, is_there, real_path
from diffusion_runtime.scratch import scratch

Described = tuple[str, str, Manifest]
"""Attention, kind and manifest of one folder of models."""


def add_manifests(
    folder: Path,
    found: Mapping[str, Mapping[str, Manifest]],
    assumed: without_manifest.Assumed,
    name: str | None,
    known: Hashes,
    note: Callable[[str], None],
) -> Iterator[Described]:
    """Write a manifest for all models below ``folder`` that have none, and yield it; those that lie in no variant's
    place are linked to one. ``found`` are the manifests that are there, ``name`` is the checkpoint's, else as their
    files say.

    Raises InputError for models that this version does not cover, that symbolic links lead out of the folder, or
    where the tokenizer's files are nowhere.
    """
    names = {attention: kinds["packages"].name for attention, kinds in found.items() if "packages" in kinds}
    for place, attention, kind in _found(folder):
        described = describe(place, assumed)
        made, tokenizer = described.manifest, described.tokenizer
        chosen = attention or made.attention
        target = folder / chosen / kind
        tokenizer = tokenizer or _beside(folder, target)
        if tokenizer is None:
            raise InputError(
                f"{place}: no vocab.json and merges.txt, which apps need: copy them there from the checkpoint's "
                "tokenizer"
            )
        _refuse_links(made, place, folder)
        title = name or names.get(chosen) or (real_path(folder).name if made.name == place.name else made.name)
        made = made.model_copy(update={"name": title, "source": made.source.model_copy(update={"name": title})})
        if target == place:
            made = _completed(made, place, tokenizer, chosen, kind, known)
        elif target.exists():
            raise InputError(f"{target}: is in the way of the models of {place}; remove it")
        else:
            with unfinished_folder(target) as unfinished:
                for file in (file for component in made.components.values() for file in component.files):
                    share_tree(place / file, unfinished / file)
                made = _completed(made, unfinished, tokenizer, chosen, kind, known)
        if kind == "packages":
            names[chosen] = title
        for line in described.notes:
            note(line)
        yield chosen, kind, made


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
            names = (compiled_names(unet, count)[0] for unet in UNETS for count in (1, 2))
            compiled = any((place / f"{name}.mlmodelc").is_dir() for name in names)
            yield place, None, KINDS[int(compiled)]


def _lacks_manifest(place: Path) -> bool:
    return not is_there(place / manifest.FILE_NAME, PackageError) and without_manifest.holds_unet(place)


def _beside(folder: Path, target: Path) -> Path | None:
    """The tokenizer's files of another kind of the same variant, or of the whole folder."""
    places = (*(target.parent / kind for kind in KINDS), folder, folder / "Resources", folder / "tokenizer")
    return next((place for place in places if all((place / file).is_file() for file in VOCABULARY_FILES)), None)


def _refuse_links(made: Manifest, place: Path, folder: Path) -> None:
    """Raise InputError for a symbolic link that leads out of the folder: what it names is not shared."""
    for file in (file for component in made.components.values() for file in component.files):
        for path in (place / file, *(place / file).rglob("*")):
            if path.is_symlink() and not is_inside(path, folder):
                raise InputError(f"{path}: is a symbolic link out of {folder}; put the file there")


def _completed(made: Manifest, place: Path, tokenizer: Path, attention: str, kind: str, known: Hashes) -> Manifest:
    """Put the tokenizer's files and the manifest next to the models in ``place``."""
    if not all((place / file).exists() for file in VOCABULARY_FILES):
        _copy_tokenizer(tokenizer, place)
    made = _with_files(made, place, attention, kind, known)
    manifest.write(made, place)
    return made


def _copy_tokenizer(tokenizer: Path, place: Path) -> None:
    """Its vocabulary with settings and added tokens, in the form that apps read; what is in ``place`` is kept."""
    files = {name: tokenizer / name for name in TOKENIZER_FILES if is_there(tokenizer / name, PackageError)}
    with scratch() as written:
        write_vocabulary(files, written)
        for file in sorted(written.iterdir()):
            if not (place / file.name).exists():
                with unfinished_file(place / file.name) as unfinished:
                    shutil.copyfile(file, unfinished)


def _with_files(made: Manifest, place: Path, attention: str, kind: str, known: Hashes) -> Manifest:
    components = {
        name: component.model_copy(update=measured(place, component.files, known))
        for name, component in made.components.items()
    }
    return made.model_copy(
        update={
            "kind": kind,
            "attention": attention,
            "components": components,
            "tokenizer": ".",
            "tokenizer_sha256": tokenizer_hashes(place, (".",), known),
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
