"""Whether the models of a folder, packages and compiled ones, compute what their source does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusion_convert.bundle import add_manifests
from diffusion_convert.checkpoint.folding import fold
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components import component as component_of
from diffusion_convert.components import of_checkpoint
from diffusion_convert.components.component import Shape
from diffusion_convert.inspect import palettized_weights
from diffusion_convert.layouts import laid_out
from diffusion_convert.verification import compare
from diffusion_convert.verification.bounds import bound_db
from diffusion_convert.verification.compare import Expected
from diffusion_runtime.bundle import manifest, views, without_manifest
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import check_files
from diffusion_runtime.bundle.manifest import FILE_NAME, AddedEmbedding, FusedLora, Manifest
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import ATTENTIONS, Layout
from diffusion_runtime.folding import Folding
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.models import chained
from diffusion_runtime.picture_size import Size, parse_size
from diffusion_runtime.real_path import is_there

_SLACK_DB = 1.0
"""By how much a figure may be below what its record leads to: other processors round otherwise."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One component of one folder. ``bound_db`` is what every output must reach."""

    folder: str
    component: str
    psnr_db: dict[str, float]
    bound_db: float

    @property
    def holds(self) -> bool:
        return all(value >= self.bound_db for value in self.psnr_db.values())


def verify_models(models: Path, checkpoint: Checkpoint, report: Callable[[str], None]) -> Iterator[Comparison]:
    """Compare every component of every folder of models below ``models`` with the checkpoint's own network.

    Files are compared with the manifests first; models of other tools may have none. Raises InputError where there
    are no models or the checkpoint lacks a component, PackageError where files are missing or changed.
    """
    folders = _folders(models)
    made = {folder: _described(folder) for folder in folders}
    for folder, described in made.items():
        check_files(described, folder)
        _check_source(described, checkpoint, folder, guessed=not is_there(folder / FILE_NAME, PackageError))
        if described.source.loras != checkpoint.source.loras:
            was, now = (_loras(source.loras) for source in (described.source, checkpoint.source))
            report(f"note: {folder} was made with {was}, and is compared with a checkpoint with {now}")
        if described.source.embeddings != checkpoint.source.embeddings:
            was, now = (_embeddings(source.embeddings) for source in (described.source, checkpoint.source))
            report(f"note: {folder} was made with {was}, and is compared with a checkpoint with {now}")
    references: dict[tuple[str, Shape, Layout, tuple[Folding, ...], int], Expected] = {}
    for folder, described in made.items():
        names = described.folded.names
        folded = replace(fold(checkpoint, names) if names else checkpoint, clip_skip=described.clip_skip)
        shown = folder.relative_to(models).as_posix() if folder != models else folder.name
        for name, size, component in _each(described):
            shape = Shape(size.height, size.width, described.batch_size, views.text_tokens(described))
            key = name, shape, described.layout, names, described.clip_skip
            title = f"{name} {size}" if size in map(parse_size, described.components[name].sizes) else name
            if key not in references:
                report(f"running the source's own {title}")
                own = laid_out(component_of(name), described.layout)
                references[key] = compare.reference(own, folded, shape, lambda _: None)
            report(f"running {shown}: {title}")
            paths = [folder / file for file in component.files]
            bound = _bound(name, component, _palette_widths(paths) if component.palettization else ())
            yield Comparison(shown, title, _measure(paths, references[key], component.function), bound)


def _each(described: Manifest) -> Iterator[tuple[str, Size, manifest.Component]]:
    """Each component for each size that it is made for; those for all sizes once."""
    for name, component in described.components.items():
        for size in map(parse_size, component.sizes or [str(described.sizes[0])]):
            yield name, size, component.at(size)


def _folders(models: Path) -> list[Path]:
    if models.suffix == ".zip":
        raise InputError(f"{models}: is a zip; unpack it first and name the folder")
    if not models.is_dir():
        raise InputError(f"{models}: no such folder of models")
    found = [models / name / kind for name in ATTENTIONS for kind in KINDS]
    there = [folder for folder in found if _holds_models(folder)]
    if there and not is_there(models / FILE_NAME, PackageError):
        return there
    inside = [entry for entry in models.iterdir() if entry.is_dir()]
    places = (models, models / "Resources", *(inside if len(inside) == 1 else ()))  # the last: an unpacked zip
    there = [folder for folder in places if _holds_models(folder)]
    if not there:
        raise InputError(
            f"{models}: holds no models: expected {FILE_NAME}, original/packages/{FILE_NAME} or models of Apple's "
            "tools"
        )
    return there


def _holds_models(folder: Path) -> bool:
    return is_there(folder / FILE_NAME, PackageError) or without_manifest.holds_unet(folder)


def _described(folder: Path) -> Manifest:
    if is_there(folder / FILE_NAME, PackageError):
        return manifest.read(folder)
    return add_manifests.describe(folder, without_manifest.Assumed()).manifest


def _check_source(described: Manifest, checkpoint: Checkpoint, folder: Path, guessed: bool) -> None:
    known = of_checkpoint(checkpoint)
    missing = [name for name in described.components if name not in known]
    if missing or (described.family != checkpoint.family and not guessed):
        what = f"has no {', '.join(missing)}" if missing else f"is of family {checkpoint.family}"
        raise InputError(
            f"{checkpoint.name}: {what}, but {folder} was made from {described.source.name} ({described.family}); "
            "name the checkpoint that the models were converted from"
        )


def _loras(loras: Iterable[FusedLora]) -> str:
    """As options, as far as the record tells."""
    told = [f"--lora {lora}{' --lora-partial' * bool(lora.left_out)}" for lora in loras]
    return " ".join(told) or "no LoRA"


def _embeddings(added: Iterable[AddedEmbedding]) -> str:
    return " ".join(f"--embedding {one}" for one in added) or "no textual inversion"


def _bound(name: str, component: manifest.Component, bits: Iterable[int]) -> float:
    """What the component owns for the width of its weights: never less, whatever its manifest says.

    ``bits`` are the widths of the palettized weights that its files hold. A palettized component's record, which is
    against its 16-bit form, can only raise the bound: to the record and the 16-bit form's own noise together.
    """
    owner, palettized, found = component_of(name), component.palettization, tuple(bits)
    if palettized is None or not found:
        return owner.min_psnr_db
    bound = bound_db(max(palettized.nbits, min(found)), owner.min_palettized_psnr_db)
    if not component.psnr_db:
        return bound
    noise = 10 ** (-min(component.psnr_db.values()) / 10) + 10 ** (-owner.min_psnr_db / 10)
    return max(bound, -10 * math.log10(noise) - _SLACK_DB)


def _palette_widths(paths: Iterable[Path]) -> set[int]:
    """Bits of the palettized weights in the models at ``paths``; none where all weights are whole."""
    functions = (open_package(path).model.function for path in paths)
    return {bits for function in functions for bits in palettized_weights(function)}


def _measure(paths: list[Path], expected: Expected, function: str | None = None) -> dict[str, float]:
    """PSNR of each output, the worst over all runs; chunks run one after the other."""
    from diffusion_runtime.backends.torch_mil import TorchBackend

    backend = TorchBackend(stream_weights=True)
    model = chained([lambda path=path: backend.load(path, function=function) for path in paths])()  # type: ignore[misc]
    worst: dict[str, float] = {}
    for inputs, outputs in zip(expected.inputs, expected.outputs, strict=True):
        found = model(**_named(inputs, tuple(model.inputs)))
        for name, array in outputs.items():
            if name not in found:
                raise PackageError(f"{paths[-1]}: has no output {name} (it has {', '.join(found)})")
            own, source = found[name].shape, array.shape
            if [side for side in own if side > 1] != [side for side in source if side > 1]:
                raise InputError(
                    f"{paths[-1]}: its {name} is {own}, and {source} of the source's network: name the checkpoint "
                    "that the models were converted from"
                )
            psnr = compare.psnr_db(array, found[name])
            worst[name] = min(worst.get(name, psnr), psnr)
    return worst


def _named(inputs: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """``inputs`` as a model names them: a single one may have another name (older VAE encoders: z for x)."""
    return dict(zip(names, inputs.values(), strict=True)) if len(inputs) == len(names) == 1 else inputs
