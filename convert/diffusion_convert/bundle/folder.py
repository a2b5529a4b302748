"""A folder of models made ready for apps: compiled, equal files stored once, a model card, and zips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_convert.bundle.add_manifests import add_manifests
from diffusion_convert.bundle.model_card import put_picture, write_model_card
from diffusion_convert.bundle.variants import (
    Report,
    compile_variant,
    is_current,
    read_variants,
    required_variants,
    share_identical,
    sweep_variants,
    zip_variants,
)
from diffusion_convert.compile import Compiler
from diffusion_runtime.atomic import locked
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import Fault, Hashes, damaged, faults
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.bundle.without_manifest import Assumed
from diffusion_runtime.errors import PackageError


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """``assumed`` and ``name`` are for models of other tools: what no file says, and the checkpoint's name."""

    zips: bool = False
    card: bool = True
    picture: Path | None = None
    assumed: Assumed = field(default_factory=Assumed)
    name: str | None = None
    compiler: Compiler = Compiler.PYTHON


@dataclass(frozen=True, slots=True)
class Bundled:
    """What was written; ``saved_bytes`` by storing equal files once."""

    saved_bytes: int
    zips: tuple[Path, ...]
    card: Path | None


def bundle_folder(
    folder: Path,
    options: BundleOptions | None = None,
    report: Report = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> Bundled:
    """Compile what is not compiled, or not whole; then share, zip and describe, as ``options`` say.

    Every file is compared with its manifest before anything is written. Raises PackageError that names what is
    changed or missing, InputError where there are no models or a file is not a picture, StorageError where another
    process is writing to the folder or the disk refuses.
    """
    options = options or BundleOptions()
    if not folder.is_dir():
        required_variants(folder)
    with locked(folder):
        known = Hashes()
        sweep_variants(folder)
        found = read_variants(folder)
        stale = _stale(folder, found, known)
        for attention, kind, made in add_manifests(folder, found, options.assumed, options.name, known, note):
            found.setdefault(attention, {})[kind] = made
        stale |= {attention for attention, kinds in found.items() if "compiled" not in kinds}
        found = found or required_variants(folder)
        if options.picture is not None:
            put_picture(options.picture, folder)
        for attention in (name for name in found if name in stale):
            packages, compiled = (folder / attention / kind for kind in KINDS)
            report(f"compiling {packages}")
            source = found[attention]["packages"]
            made = compile_variant(packages, compiled, options.compiler, report, source, known)
            found[attention]["compiled"] = made
        saved = share_identical(folder, found)
        compiled_ones = {name: kinds["compiled"] for name, kinds in found.items()}
        zips = zip_variants(folder, compiled_ones, report) if options.zips else ()
        return Bundled(saved, zips, write_model_card(folder, found) if options.card else None)


def _stale(folder: Path, found: Mapping[str, Mapping[str, Manifest]], known: Hashes) -> set[str]:
    """The variants whose packages are to be compiled: nothing is compiled of them, what is was compiled of others,
    or some of it is missing. Raises PackageError for any other damage."""
    stale = set()
    for attention, kinds in found.items():
        packages, compiled = kinds.get("packages"), kinds.get("compiled")
        if packages is not None and (wrong := faults(packages, folder / attention / "packages", known)):
            raise damaged(folder / attention / "packages", wrong)
        if compiled is None or (packages is not None and not is_current(packages, compiled)):
            stale.add(attention)
            continue
        place = folder / attention / "compiled"
        wrong = faults(compiled, place, known)
        changed = any(fault is not Fault.MISSING for files in wrong.values() for fault in files.values())
        if wrong and packages is not None and compiled.tools and not changed:
            stale.add(attention)
        elif wrong and packages is not None and compiled.tools:
            raise PackageError(f"{damaged(place, wrong)}; or remove {place}, to have it compiled anew")
        elif wrong:
            raise damaged(place, wrong)
    return stale
