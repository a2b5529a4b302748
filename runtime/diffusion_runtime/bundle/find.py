"""Folders of models: ours, which have a manifest.json, and others', whose manifest is made from what can be seen.

What a user names may be the folder that `convert` wrote ({attention}/{packages,compiled}/), a variant in it, or the
folder of the models themselves; `find` chooses, and says what it chose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffusion_runtime.backends import Backend, ComputeUnits
from diffusion_runtime.bundle import manifest, without_manifest
from diffusion_runtime.bundle.manifest import Component, Manifest
from diffusion_runtime.bundle.views import as_unet
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import (
    ATTENTIONS,
    PROCESSORS,
    TEXT_ENCODERS,
    UNET,
    AttentionKind,
    Layout,
    family_named,
    preferred,
)
from diffusion_runtime.models import Load, Models, chained, renamed, sized
from diffusion_runtime.real_path import is_there

KINDS = ("packages", "compiled")


@dataclass(frozen=True, slots=True)
class Bundle:
    """The models of one variant. ``notes`` say what was chosen and assumed."""

    folder: Path
    manifest: Manifest
    tokenizer: Path | None
    notes: tuple[str, ...] = ()

    def text_lengths(self) -> tuple[int, ...]:
        """How many tokens each of the text encoders takes, in order, as far as the manifest says."""
        described = [self.manifest.components[name] for name in TEXT_ENCODERS if name in self.manifest.components]
        return tuple(component.inputs[0].shape[-1] for component in described if component.inputs)

    def paths(self, component: str) -> tuple[Path, ...]:
        """The model, or the chunks in the order in which they run."""
        return tuple(self.folder / name for name in self.manifest.components[component].files)


def find(
    path: Path,
    *,
    backend: str = "torch",
    compute_units: ComputeUnits | None = None,
    assumed: without_manifest.Assumed | None = None,
) -> Bundle:
    """The best variant at ``path`` for a backend ("coreml" or "torch") and compute units.

    Raises InputError if there is no variant, PackageError for a damaged one."""
    if not path.exists():
        raise InputError(f"{path}: no such folder; expected models that `coreml-sd convert` wrote")
    if path.suffix in (".mlpackage", ".mlmodelc"):
        raise InputError(f"{path}: is one model; name the folder that holds all of them, {path.parent}")
    if path.suffix == ".zip":
        raise InputError(f"{path}: is a zip: unpack it (`unzip {path.name} -d {path.stem}`) and name the folder")
    found = [
        folder
        for folder in _candidates(path)
        if is_there(folder / manifest.FILE_NAME, PackageError) or without_manifest.holds_unet(folder)
    ]
    if not found:
        raise InputError(
            f"{path}: holds no models: expected {manifest.FILE_NAME}, Stable_Diffusion_version_*_unet.mlpackage or "
            "Unet.mlmodelc, there or in original/packages and the like"
        )
    described = [folder for folder in found if is_there(folder / manifest.FILE_NAME, PackageError)]
    chosen = min(described or found, key=lambda folder: _rank(folder, backend, compute_units))
    bundle = _open(chosen, assumed or without_manifest.Assumed())
    if len(found) == 1:
        return bundle
    others = ", ".join(sorted(_shown(folder, path) for folder in found if folder != chosen))
    return replace(bundle, notes=(f"using {_shown(chosen, path)} (also there: {others})", *bundle.notes))


def open_models(
    bundle: Bundle, backend: Backend, compute_units: ComputeUnits | None = None, keep: bool = True
) -> Models:
    """The models of a bundle, loaded when asked for, on the manifest's compute units unless others are given."""

    def load(component: Component, compute_units_of: str) -> Load:
        units = compute_units or parse_units(compute_units_of)
        paths = [bundle.folder / name for name in component.files]
        return chained([partial(backend.load, path, units, component.function) for path in paths])

    loads = {}
    for name, component in bundle.manifest.components.items():
        first, *others = component.sizes or {"": component}
        loads[name] = load(component.sizes.get(first, component), component.compute_units)
        for size in others:
            loads[sized(name, size)] = load(component.sizes[size], component.compute_units)
    denoiser = family_named(bundle.manifest.family).denoiser
    if denoiser is UNET or denoiser.component not in loads:
        return Models(loads, keep)
    for size in ("", *bundle.manifest.components[denoiser.component].sizes):
        name = sized(denoiser.component, size) if size else denoiser.component
        if name in loads:
            loads[name] = renamed(loads[name], denoiser.names)
    return Models(loads, keep).known_as({name: name for name in loads} | {"unet": denoiser.component})


def parse_units(text: str) -> ComputeUnits:
    """Compute units as the command line, a manifest or coremltools spells them."""
    wanted = text.lower().replace("_", "-")
    for units in ComputeUnits:
        if units.value == wanted:
            return units
    raise InputError(f"unknown compute units {text!r}: expected one of {', '.join(u.value for u in ComputeUnits)}")


def unit_notes(bundle: Bundle, compute_units: ComputeUnits | None) -> tuple[str, ...]:
    """Warnings for the compute units that the UNet would run on."""
    unet = as_unet(bundle.manifest).unet
    if unet is None:
        return ()
    units = compute_units or parse_units(unet.compute_units)
    note = bad_pairing(bundle.manifest.attention, units)
    return () if note is None else (note,)


def bad_pairing(attention: str, units: ComputeUnits) -> str | None:
    """Why models of this attention should not run on these compute units, where that is known.

    From reports of users: apple/ml-stable-diffusion#267 and #282."""
    if attention not in ATTENTIONS or units is ComputeUnits.CPU_ONLY:
        return None
    made_for = AttentionKind(attention).about.compute_units
    better = preferred(units.value)[0]
    if better.about.compute_units == made_for:
        return None
    harm = "is slow and on some systems gives noise" if made_for == "cpu-and-ne" else "may hang or fail to load"
    return (
        f"attention `{attention}` with --compute-units {units.value} {harm}: it is made for the "
        f"{PROCESSORS[made_for]}; use --compute-units {made_for}, or models with {better.value}"
    )


def check_layout(bundle: Bundle) -> None:
    """Raises InputError for models whose inputs and outputs are called as another program's."""
    layout = bundle.manifest.layout
    if layout is not Layout.APPLE:
        raise InputError(
            f"{bundle.folder}: was converted with --layout {layout.value}, for other programs; convert without it"
        )


def _candidates(path: Path) -> Iterator[Path]:
    """Folders that may hold models: the one named, variants in it, and the only folder of an unpacked zip."""
    if not path.is_dir():
        return
    yield path
    for kind in (*KINDS, "Resources"):
        yield path / kind
    for attention in ATTENTIONS:
        yield path / attention
        for kind in KINDS:
            yield path / attention / kind
    # __MACOSX lies in zips that macOS has made.
    inner = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]
    if len(inner) == 1 and inner[0].suffix not in (".mlpackage", ".mlmodelc") and inner[0].name not in ATTENTIONS:
        yield inner[0]


def _rank(folder: Path, backend: str, units: ComputeUnits | None) -> tuple[int, int]:
    """Lower is better: the attention that suits the compute units, then the kind that loads fastest."""
    compute_units = (units.value if units else None) if backend == "coreml" else "cpu-only"
    order = [kind.value for kind in preferred(compute_units)]
    attention = next((name for name in order if name in (folder.name, folder.parent.name)), order[0])
    compiled = folder.name in ("compiled", "Resources")
    wants_compiled = backend == "coreml" and sys.platform == "darwin"
    return order.index(attention), int(compiled != wants_compiled)


def _open(folder: Path, assumed: without_manifest.Assumed) -> Bundle:
    if not is_there(folder / manifest.FILE_NAME, PackageError):
        described = without_manifest.describe(folder, assumed)
        return Bundle(folder, described.manifest, described.tokenizer, described.notes)
    read = manifest.read(folder)
    missing = [name for part in read.components.values() for name in part.files if not (folder / name).exists()]
    if missing:
        raise PackageError(f"{folder}: {manifest.FILE_NAME} names what is not there: {', '.join(missing)}")
    return Bundle(folder, read, None if read.tokenizer is None else folder / read.tokenizer)


def _shown(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix() if folder != root else folder.name
