"""What a conversion leaves behind: variants with packages and compiled models, zips, files shared between them.

DIR/{attention}/packages/   Stable_Diffusion_version_…_unet.mlpackage, …, vocab.json, merges.txt, manifest.json
DIR/{attention}/compiled/   Unet.mlmodelc, …, vocab.json, merges.txt, manifest.json
DIR/coreml-{name}[-palettized]_{attention}_compiled.zip
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_convert.bundle.sizes import packed, write_size_folders
from diffusion_convert.bundle.zip_names import zip_names
from diffusion_convert.compile import Compiler, compile_package
from diffusion_runtime import zips
from diffusion_runtime.atomic import sweep, unfinished_folder, work
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import (
    Hashes,
    check_files,
    measured,
    tokenizer_files,
    tokenizer_hashes,
)
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import ATTENTIONS, compiled_names
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES
from diffusion_runtime.real_path import is_there

Report = Callable[[str], None]


def read_variants(folder: Path) -> dict[str, dict[str, Manifest]]:
    """The manifests of what ``convert`` wrote, by attention and kind: each is read once.

    Raises InputError where there is no such folder, PackageError for a damaged manifest."""
    if not folder.is_dir():
        raise InputError(f"{folder}: {'is a file; expected a folder' if folder.exists() else 'no such folder'}")
    found = {
        attention: {
            kind: manifest.read(folder / attention / kind)
            for kind in KINDS
            if is_there(folder / attention / kind / manifest.FILE_NAME, PackageError)
        }
        for attention in ATTENTIONS
    }
    return {attention: kinds for attention, kinds in found.items() if kinds}


def sweep_variants(folder: Path) -> None:
    """Finish or remove what killed processes left next to the variants' models in ``folder``."""
    for place in (place for name in ATTENTIONS for place in (folder / name, *(folder / name).glob("*"))):
        sweep(place)


def required_variants(folder: Path) -> dict[str, dict[str, Manifest]]:
    """As `read_variants`; raises InputError if the folder has no variant."""
    found = read_variants(folder)
    if not found:
        raise InputError(
            f"{folder}: holds no variant: expected {ATTENTIONS[0]}/packages/{manifest.FILE_NAME} or the like"
        )
    return found


def compile_variant(
    packages: Path,
    compiled: Path,
    compiler: Compiler = Compiler.PYTHON,
    report: Report = lambda _: None,
    source: Manifest | None = None,
    known: Hashes | None = None,
) -> Manifest:
    """Compile the packages of one variant to ``compiled``, with tokenizer files and a manifest of its own.

    ``source`` is the packages' manifest where the caller has read it and checked the files. An older
    folder is replaced once the new one is complete. Raises as ``compile_package`` does, and PackageError where
    the packages are not those of their manifest.
    """
    if source is None:
        source = manifest.read(packages)
        check_files(source, packages, known)
    with unfinished_folder(compiled) as unfinished:
        components = {
            name: _compile_component(name, component, packages, unfinished, compiler, report, known)
            for name, component in source.components.items()
        }
        # T5's lies where apps look for it, with CLIP's vocabulary.
        beside = source.tokenizer if source.tokenizer_3 is not None else None
        third = _copy_tokenizer(source.tokenizer_3, packages, unfinished)
        first = _copy_tokenizer(source.tokenizer, packages, unfinished, beside or ".")
        second = _copy_tokenizer(source.tokenizer_2, packages, unfinished, "tokenizer_2")
        made = source.model_copy(
            update={
                "kind": "compiled",
                "components": components,
                "tokenizer": first,
                "tokenizer_2": second,
                "tokenizer_3": third,
                "tokenizer_sha256": tokenizer_hashes(unfinished, (first, second, third), known),
            }
        )
        manifest.write(made, unfinished)
        write_size_folders(made, unfinished, known)
    return made


def _compile_component(
    name: str,
    component: manifest.Component,
    packages: Path,
    target: Path,
    compiler: Compiler,
    report: Report,
    known: Hashes | None,
) -> manifest.Component:
    """Compile a component's packages, those for further sizes too, into the folder ``target``; its entry there."""
    made_of: dict[str, str] = {}
    for one in (component, *component.sizes.values()):
        for file, compiled_name in zip(one.files, compiled_names(name, len(one.files)), strict=True):
            if file not in made_of:
                place = target / Path(file).parent
                result = compile_package(packages / file, place, compiled_name, compiler, share_weights=True)
                made_of[file] = result.path.relative_to(target).as_posix()
                if result.inferred:
                    report(f"{result.path.name}: operation versions inferred for {', '.join(result.inferred)}")
    sizes = {
        size: one.model_copy(update={"files": tuple(made_of[file] for file in one.files)})
        for size, one in component.sizes.items()
    }
    files = tuple(made_of[file] for file in component.files)
    told = {"files": files, "sizes": sizes, **measured(target, tuple(made_of.values()), known)}
    return component.model_copy(update=told)


def is_current(packages: Manifest, compiled: Manifest) -> bool:
    """Whether the compiled models were made of the packages as they are: the manifests agree in all but the files.

    What another compiler made (its manifest names no tools) counts as such, so that it is kept.
    """
    return not compiled.tools or packages.model_dump(exclude=_OF_FILES) == compiled.model_dump(exclude=_OF_FILES)


_OF_FILES: Any = {
    **dict.fromkeys(("kind", "tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_sha256"), True),
    "components": {
        "__all__": {"files": True, "sha256": True, "size_bytes": True, "sizes": {"__all__": {"files": True}}}
    },
}
"""Fields of a manifest that differ between packages and what is compiled of them."""


def _copy_tokenizer(named: str | None, packages: Path, compiled: Path, place: str = ".") -> str | None:
    """Copy the files of a tokenizer, from the folder ``named`` next to the packages, to ``place`` next to the
    compiled models; the first one's lie where apps look for them."""
    if named is None:
        return None
    folder, target = packages / named, compiled / place
    target.mkdir(exist_ok=True)
    for file in tokenizer_files(folder):
        shutil.copyfile(file, target / file.name)
    missing = [name for name in VOCABULARY_FILES if not (target / name).is_file()]
    if missing:
        raise InputError(f"{folder}: no {' and no '.join(missing)}: apps need them next to the compiled models")
    return place


def zip_variants(
    folder: Path, compiled: Mapping[str, Manifest], report: Report = lambda _: None
) -> tuple[Path, ...]:
    """Zip the compiled models of the variants in ``folder``, whose manifests are given by attention.

    Returns the zips. A variant that stands in for one that is not there is zipped under its name too (`zip_names`).
    """
    written = []
    for attention, made in compiled.items():
        for name, size in zip_names(made, attention, compiled).items():
            report(f"packing {name}")
            place, without, instead = packed(made, folder / attention / KINDS[1], size)
            zips.pack(place, folder / name, without, instead)
            written.append(folder / name)
    return tuple(written)


def share_identical(folder: Path, variants: Mapping[str, Mapping[str, Manifest]]) -> int:
    """Make equal files of the variants' models one file on disk; return the bytes saved.

    Files are taken for equal where their manifests' hashes are: check them before. Where the file system has no
    hard links, nothing changes.
    """
    first: dict[str, Path] = {}
    saved = 0
    with work(folder) as slot:
        for attention, kinds in variants.items():
            for kind, made in kinds.items():
                for component in made.components.values():
                    for name, digest in component.sha256.items():
                        path = folder / attention / kind / name
                        known = first.setdefault(digest, path)
                        saved += 0 if known is path else _link(known, path, slot / "link")
    return saved


def _link(known: Path, path: Path, unfinished: Path) -> int:
    """Replace ``path`` by a link to ``known``; the bytes that this saves."""
    if not path.is_file() or known.samefile(path) or known.stat().st_size != path.stat().st_size:
        return 0
    try:
        # `os.link` replaces nothing: a link of another name is made first, which then takes the file's place.
        os.link(known, unfinished)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        return 0
    return path.stat().st_size
