"""What a package, compiled model, bundle or zip is: interface, operations, precision, sizes, work, obstacles."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_convert.compile import check_weights
from diffusion_convert.compile.coverage import inferred_versions
from diffusion_convert.compile.metadata_json import compute_precision, histogram, palette_bits, storage_precision
from diffusion_convert.inspect.obstacles import Obstacle, obstacles
from diffusion_convert.inspect.work import Work, floating_point_work
from diffusion_runtime import zips
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.without_manifest import einsum_shapes
from diffusion_runtime.errors import DiffusionError, InputError, PackageError
from diffusion_runtime.families import SYSTEMS, attention_of
from diffusion_runtime.mil.functions import function_names
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import Feature, Function, operations
from diffusion_runtime.mil.text_print import OPSETS
from diffusion_runtime.real_path import is_there
from diffusion_runtime.scratch import scratch

_MODELS = (".mlpackage", ".mlmodelc", ".mlmodel")


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output; ``flexible`` spells ranges or enumerated shapes, "" where the shape is fixed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    flexible: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class FunctionReport:
    """One function of a model that has several; all share its weights."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model; of several ``functions`` the figures are of the default one, the first. ``bits`` maps bits per
    palettized weight to the number of such weights.

    ``histogram`` counts operations under the versioned names by which apps look them up in metadata.json;
    ``inferred`` are operations whose version was never seen in a real compiled model, or which have none.
    """

    name: str
    kind: str
    specification_version: int
    opset: str
    target: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operations: dict[str, int]
    histogram: dict[str, int]
    inferred: tuple[str, ...]
    precision: str
    storage: str
    bits: dict[int, int]
    size_bytes: int
    weight_bytes: int
    attention: str | None
    work: Work
    obstacles: tuple[Obstacle, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    functions: tuple[FunctionReport, ...] = ()


@dataclass(frozen=True, slots=True)
class FolderReport:
    """Models of one folder, with what its manifest says, where it has one."""

    name: str
    models: tuple[ModelReport, ...]
    manifest: manifest.Manifest | None = None


def inspect(path: Path) -> tuple[FolderReport, ...]:
    """Reports of whatever lies at ``path``; a single model is a folder's only one.

    Raises InputError where there is nothing that can be inspected, PackageError for damaged models and zips.
    Nothing is run; of a zip the weights are not unpacked.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix == ".zip":
        return _inspect_zip(path)
    if path.suffix in _MODELS or (path / "model.mil").is_file() or (path / "Manifest.json").is_file():
        return (FolderReport(path.name, (_report(path, path.name, _sizes(path)),)),)
    if not path.is_dir():
        raise InputError(f"{path}: is a file; expected {', '.join(_MODELS)}, a folder of them or a zip")
    return _inspect_folder(path, path.name, _sizes(path))


def _inspect_folder(
    path: Path, name: str, sizes: Mapping[str, int], with_weights: bool = True
) -> tuple[FolderReport, ...]:
    found: dict[Path, list[Path]] = {}
    for model in _models_below(path):
        found.setdefault(model.parent, []).append(model)
    if not found:
        raise InputError(f"{path}: holds no models; expected {', '.join(_MODELS[:2])}, a folder of them or a zip")
    return tuple(
        _inspect_models(folder, models, path, name, sizes, with_weights) for folder, models in sorted(found.items())
    )


def _inspect_models(
    folder: Path, models: list[Path], root: Path, name: str, sizes: Mapping[str, int], with_weights: bool
) -> FolderReport:
    reports = []
    for model in sorted(models):
        prefix = model.relative_to(root).as_posix() + "/"
        own = {key.removeprefix(prefix): size for key, size in sizes.items() if key.startswith(prefix)}
        reports.append(_report(model, model.name, own, with_weights))
    described = manifest.read(folder) if is_there(folder / manifest.FILE_NAME, PackageError) else None
    relative = folder.relative_to(root).as_posix()
    return FolderReport(name if relative == "." else f"{name}/{relative}", tuple(reports), described)


def _inspect_zip(path: Path) -> tuple[FolderReport, ...]:
    with scratch() as temporary:
        target = temporary / path.stem
        zips.unpack(path, target, wanted=lambda name: "/weights/" not in f"/{name}")
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
        try:
            return _inspect_folder(target, path.name, sizes, with_weights=False)
        except DiffusionError as error:  # of a folder that is gone with this block
            raise type(error)(str(error).replace(str(target), str(path))) from error


def _models_below(path: Path) -> Iterator[Path]:
    for entry in sorted(path.iterdir()):
        if entry.suffix in _MODELS:
            yield entry
        elif entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            yield from _models_below(entry)


def _sizes(path: Path) -> dict[str, int]:
    if path.is_file():
        return {path.name: path.stat().st_size}
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}


def _report(path: Path, name: str, sizes: Mapping[str, int], with_weights: bool = True) -> ModelReport:
    package = open_package(path)
    model, function = package.model, package.model.function
    if with_weights:
        for each in model.program.functions.values():
            check_weights(package, each)
    weight_bytes = sum(size for file, size in sizes.items() if "weights" in Path(file).parts)
    counts = Counter(operation.type for operation in operations(function.block))
    known = function.opset in OPSETS
    return ModelReport(
        name=name,
        kind=path.suffix.removeprefix("."),
        specification_version=model.specification_version,
        opset=OPSETS.get(function.opset, function.opset),
        target=SYSTEMS[model.specification_version].title if model.specification_version in SYSTEMS else "unknown",
        inputs=tuple(_port(feature) for feature in model.interface.inputs),
        outputs=tuple(_port(feature) for feature in model.interface.outputs),
        operations=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        histogram=histogram(function) if known else {},
        inferred=inferred_versions(function) if known else (),
        precision=compute_precision(function),
        storage=storage_precision(function) or "",
        bits=palettized_weights(function),
        size_bytes=sum(sizes.values()),
        weight_bytes=weight_bytes,
        attention=attention_kind(function),
        work=floating_point_work(function),
        obstacles=obstacles(model, weight_bytes),
        metadata=_metadata(model),
        functions=tuple(_function(package.of(each).model, each) for each in function_names(model)),
    )


def _function(model: Model, name: str) -> FunctionReport:
    interface = model.interface
    return FunctionReport(name, tuple(map(_port, interface.inputs)), tuple(map(_port, interface.outputs)))


def palettized_weights(function: Function) -> dict[int, int]:
    """Bits per palettized weight -> the number of such weights."""
    counts = Counter(bits for op in operations(function.block) if (bits := palette_bits(op)) is not None)
    return dict(sorted(counts.items()))


def attention_kind(function: Function) -> str | None:
    """How a model attends, as far as its operations tell; None where it does not."""
    softmaxes = sum(operation.type == "softmax" for operation in operations(function.block))
    shapes = einsum_shapes(function)
    return attention_of(shapes).value if shapes or softmaxes > 1 else None


def _port(feature: Feature) -> Port:
    flexible = ""
    if feature.shape_range:
        flexible = " x ".join(f"{low}...{high}" if low != high else str(low) for low, high in feature.shape_range)
    elif feature.enumerated_shapes:
        flexible = " or ".join("x".join(map(str, shape)) for shape in feature.enumerated_shapes)
    return Port(feature.name, feature.dtype, feature.shape, flexible, feature.description)


def _metadata(model: Model) -> dict[str, str]:
    about = model.metadata
    named = {
        "description": about.description,
        "author": about.author,
        "license": about.license,
        "version": about.version,
    }
    shown = {key: re.sub(r"\s+", " ", value) for key, value in (named | dict(about.user_defined)).items()}
    return {key: value for key, value in shown.items() if value}
