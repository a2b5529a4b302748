"""Whether the models of a folder, packages and compiled ones, compute what their source does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusion_convert import verify
from diffusion_convert.bundle import variants
from diffusion_convert.checkpoint import Checkpoint
from diffusion_convert.components import Shape, table
from diffusion_convert.verify import Reference
from diffusion_runtime import manifest
from diffusion_runtime.errors import InputError
from diffusion_runtime.integrity import check_files
from diffusion_runtime.manifest import FILE_NAME, Manifest

_SLACK_DB = 1.0
"""By how much a figure may be below the one that was recorded at conversion: other processors round otherwise."""


@dataclass(frozen=True, slots=True)
class Parity:
    """One component of one folder. ``bound_db`` is what every output must reach."""

    folder: str
    component: str
    psnr_db: dict[str, float]
    bound_db: float

    @property
    def holds(self) -> bool:
        return all(value >= self.bound_db for value in self.psnr_db.values())


def verify_models(models: Path, checkpoint: Checkpoint, report: Callable[[str], None]) -> Iterator[Parity]:
    """Compare every component of every folder of models below ``models`` with the checkpoint's own network.

    Files are compared with the manifests first. Raises InputError where there are no models or the checkpoint lacks
    a component, PackageError where files are missing or changed.
    """
    folders = _folders(models)
    made = {folder: manifest.read(folder) for folder in folders}
    for folder, described in made.items():
        check_files(described, folder)
        _check_source(described, checkpoint, folder)
    references: dict[tuple[str, Shape], Reference] = {}
    for folder, described in made.items():
        shape = Shape(described.height, described.width, described.batch_size)
        for name, component in described.components.items():
            if (name, shape) not in references:
                report(f"running the source's own {name}")
                references[name, shape] = verify.reference(table()[name], checkpoint, shape, lambda _: None)
            shown = folder.relative_to(models).as_posix() if folder != models else folder.name
            report(f"running {shown}: {name}")
            paths = [folder / file for file in component.files]
            yield Parity(shown, name, _measure(paths, references[name, shape]), _bound(name, component))


def _folders(models: Path) -> list[Path]:
    if (models / FILE_NAME).is_file():
        return [models]
    if not models.is_dir():
        raise InputError(f"{models}: no such folder of models")
    return [
        variant / kind
        for variant in variants(models).values()
        for kind in ("packages", "compiled")
        if (variant / kind / FILE_NAME).is_file()
    ]


def _check_source(described: Manifest, checkpoint: Checkpoint, folder: Path) -> None:
    known = table()
    missing = [
        name for name in described.components if name not in known or known[name].subfolder not in checkpoint.models
    ]
    if missing or described.family != checkpoint.family:
        what = f"has no {', '.join(missing)}" if missing else f"is of family {checkpoint.family}"
        raise InputError(
            f"{checkpoint.name}: {what}, but {folder} was made from {described.source.name} ({described.family}); "
            "name the checkpoint that the models were converted from"
        )


def _bound(name: str, component: manifest.Component) -> float:
    """The component's own bound, or what was recorded where palettization has cost more than that."""
    bound = table()[name].min_psnr_db
    recorded = min(component.psnr_db.values(), default=bound)
    return min(bound, recorded) - (_SLACK_DB if recorded < bound else 0.0)


def _measure(paths: list[Path], expected: Reference) -> dict[str, float]:
    """PSNR of each output, the worst over all runs; chunks run one after the other."""
    from diffusion_runtime.backends.torch_mil import TorchBackend
    from diffusion_runtime.models import chained

    backend = TorchBackend(stream_weights=True)
    model = chained([lambda path=path: backend.load(path) for path in paths])()  # type: ignore[misc]
    worst: dict[str, float] = {}
    for inputs, outputs in zip(expected.inputs, expected.outputs, strict=True):
        found = model(**inputs)
        for name, array in outputs.items():
            psnr = verify.psnr_db(array, found[name])
            worst[name] = min(worst.get(name, psnr), psnr)
    return worst
