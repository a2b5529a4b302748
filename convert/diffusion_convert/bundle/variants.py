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

from diffusion_convert.bundle.zip_names import zip_names
from diffusion_convert.compile import Compiler, compile_package
from diffusion_runtime import zips
from diffusion_runtime.atomic import unfinished_folder
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.integrity import check_files, hashes, size_bytes
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import ATTENTIONS, compiled_names
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES

Report = Callable[[str], None]


def _silent(_: str) -> None:
    pass


def compile_variant(
    packages: Path, compiled: Path, compiler: Compiler = Compiler.PYTHON, report: Report = _silent
) -> Manifest:
    """Compile the packages of one variant to ``compiled``, with tokenizer files and a manifest of its own.

    The folder appears whole or not at all and replaces an older one. Raises as ``compile_package`` does, and
    PackageError where the packages are not those of their manifest.
    """
    source = manifest.read(packages)
    check_files(source, packages)
    with unfinished_folder(compiled) as unfinished:
        components = {}
        for name, component in source.components.items():
            files = []
            for file, target in zip(component.files, compiled_names(name, len(component.files)), strict=True):
                result = compile_package(packages / file, unfinished, target, compiler, share_weights=True)
                files.append(result.path.name)
                if result.inferred:
                    report(f"{result.path.name}: operation versions inferred for {', '.join(result.inferred)}")
            components[name] = component.model_copy(
                update={
                    "files": tuple(files),
                    "sha256": hashes(unfinished, files),
                    "size_bytes": size_bytes(unfinished, files),
                }
            )
        made = source.model_copy(
            update={
                "kind": "compiled",
                "components": components,
                "tokenizer": _copy_tokenizer(source, packages, unfinished),
            }
        )
        manifest.write(made, unfinished)
    return made


def is_current(packages: Path, compiled: Path) -> bool:
    """Whether ``compiled`` was made of ``packages`` as they are: their manifests agree in all but the files.

    What another compiler made (its manifest names no tools) counts as such, so that it is kept.
    """
    if not (compiled / manifest.FILE_NAME).is_file():
        return False
    if not (packages / manifest.FILE_NAME).is_file() or not manifest.read(compiled).tools:
        return True
    return _without_files(manifest.read(packages)) == _without_files(manifest.read(compiled))


def _without_files(made: Manifest) -> Manifest:
    components = {
        name: component.model_copy(update={"files": (), "sha256": {}, "size_bytes": 0})
        for name, component in made.components.items()
    }
    return made.model_copy(update={"kind": "compiled", "tokenizer": None, "components": components})


def _copy_tokenizer(source: Manifest, packages: Path, target: Path) -> str | None:
    """Put the tokenizer's files beside the compiled models, where apps look for them."""
    if source.tokenizer is None:
        return None
    folder = packages / source.tokenizer
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != manifest.FILE_NAME and file.suffix in (".json", ".txt"):
            shutil.copyfile(file, target / file.name)
    missing = [name for name in VOCABULARY_FILES if not (target / name).is_file()]
    if missing:
        raise InputError(f"{folder}: no {' and no '.join(missing)}: apps need them beside the compiled models")
    return "."


def variants(folder: Path) -> Mapping[str, Path]:
    """Attention -> folder of the variant, of what ``convert`` wrote. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: {'is a file; expected a folder' if folder.exists() else 'no such folder'}")
    found = {
        name: folder / name
        for name in ATTENTIONS
        if any((folder / name / kind / manifest.FILE_NAME).is_file() for kind in ("packages", "compiled"))
    }
    if not found:
        raise InputError(
            f"{folder}: holds no variant: expected {ATTENTIONS[0]}/packages/{manifest.FILE_NAME} or the like"
        )
    return found


def zip_variants(folder: Path, report: Report = _silent) -> tuple[Path, ...]:
    """Zip the compiled models of every variant in ``folder``; return the zips.

    A variant that stands in for one that is not there is zipped under its name as well (`zip_names`).
    """
    found = variants(folder)
    written = []
    for attention, variant in found.items():
        compiled = variant / "compiled"
        made = manifest.read(compiled)
        check_files(made, compiled)
        for name in zip_names(made, attention, found):
            report(f"packing {name}")
            zips.pack(compiled, folder / name)
            written.append(folder / name)
    return tuple(written)


def share_identical(folder: Path) -> int:
    """Make equal files of the variants' models one file on disk; return the bytes saved.

    Files are taken for equal where their manifests' hashes are. Where the file system has no hard links, nothing
    changes.
    """
    first: dict[str, Path] = {}
    saved = 0
    for variant in variants(folder).values():
        for kind in ("packages", "compiled"):
            if not (variant / kind / manifest.FILE_NAME).is_file():
                continue
            for component in manifest.read(variant / kind).components.values():
                for name, digest in component.sha256.items():
                    path = variant / kind / name
                    known = first.setdefault(digest, path)
                    saved += 0 if known is path else _link(known, path)
    return saved


def _link(known: Path, path: Path) -> int:
    """Replace ``path`` by a link to ``known``; the bytes that this saves."""
    if not path.is_file() or known.samefile(path) or known.stat().st_size != path.stat().st_size:
        return 0
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        os.link(known, unfinished)
    except OSError:
        return 0
    unfinished.replace(path)
    return path.stat().st_size
