"""Models on disk: an .mlpackage folder, a bare .mlmodel file or a compiled .mlmodelc folder, all opened alike."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffusion_runtime import strict_json
from diffusion_runtime.atomic import unfinished_folder
from diffusion_runtime.errors import InputError, PackageError, UnsupportedError
from diffusion_runtime.mil import proto, text
from diffusion_runtime.mil.functions import one_function
from diffusion_runtime.mil.model import Model, check_model
from diffusion_runtime.mil.program import Blob, TensorType, Value
from diffusion_runtime.mil.weights import WeightFile
from diffusion_runtime.real_path import is_inside

MODEL_PATH = "@model_path"
_AUTHOR = "com.apple.CoreML"
_MODEL = "com.apple.CoreML/model.mlmodel"
_WEIGHTS = "com.apple.CoreML/weights"
_FORMAT = "1.0.0"


@dataclass(frozen=True, slots=True)
class Package:
    """A model and where its weights are: ``root`` is the folder that ``@model_path`` stands for."""

    path: Path
    root: Path
    model: Model
    _files: dict[str, WeightFile] = field(default_factory=dict, repr=False, compare=False)

    def array(self, value: Value) -> np.ndarray:
        """A tensor literal's elements; those in a weight file are mapped, not copied.

        Raises PackageError where its blob is missing or damaged, ValueError for anything but a tensor of numbers.
        """
        if not isinstance(value.type, TensorType) or isinstance(value.data, (str, tuple)):
            raise ValueError(f"a value of type {value.type} is no array")
        if isinstance(value.data, np.ndarray):
            return value.data
        shape = self._shape(value.type)
        return self.weight_file(value.data).read(value.data.offset, value.type.dtype, shape)

    def check_blob(self, value: Value) -> None:
        """Raise PackageError where a value's blob is missing or damaged, as far as its record shows."""
        if isinstance(value.type, TensorType) and isinstance(value.data, Blob):
            shape = self._shape(value.type)
            self.weight_file(value.data).packed(value.data.offset, value.type.dtype, shape)

    def of(self, function: str | None) -> Package:
        """The same package with one function alone (None: the default one). Raises as `one_function` does."""
        try:
            return replace(self, model=one_function(self.model, function))
        except (InputError, UnsupportedError) as error:
            raise type(error)(f"{self.path}: {error}") from error

    def stored_bytes(self) -> int:
        """The size of the weight files that were opened so far."""
        return sum(file.size_bytes for file in self._files.values())

    def release(self) -> None:
        """Let go of the pages of all weight files that were read; see ``WeightFile.release``."""
        for file in self._files.values():
            file.release()

    def _shape(self, kind: TensorType) -> tuple[int, ...]:
        shape = tuple(size for size in kind.shape if size is not None)
        if len(shape) != len(kind.shape):
            raise PackageError(f"{self.path}: a stored value of unknown shape {kind.shape}")
        return shape

    def weight_file(self, blob: Blob) -> WeightFile:
        """The file that ``blob`` lies in, opened once. Raises PackageError where it would lie outside ``root``."""
        if blob.path not in self._files:
            self._files[blob.path] = WeightFile(resolve(self.root, blob.path, self.path))
        return self._files[blob.path]


def resolve(root: Path, path: str, source: Path) -> Path:
    """The file that a blob's ``@model_path/…`` means. Raises PackageError where it would leave ``root``."""
    pure = PurePosixPath(path)
    if pure.parts[:1] != (MODEL_PATH,) or len(pure.parts) < 2 or ".." in pure.parts or "\\" in path:
        raise PackageError(f"{source}: weight path {path!r} is not inside the model, expected {MODEL_PATH}/…")
    return _inside(root.joinpath(*pure.parts[1:]), root, source)


def open_package(path: Path) -> Package:
    """Open an .mlpackage, .mlmodel or .mlmodelc. Raises InputError if nothing is there, PackageError (damaged, see
    `check_model`) or UnsupportedError as ``proto.read_model`` does."""
    package = _open(path)
    try:
        check_model(package.model)
    except PackageError as error:
        raise PackageError(f"{path}: {error}") from error
    return package


def _open(path: Path) -> Package:
    if not path.exists():
        raise InputError(f"{path}: no such model; expected an .mlpackage or .mlmodelc folder")
    if (path / "Manifest.json").is_file():
        specification = specification_path(path)
        return Package(path, specification.parent, proto.read_model(specification))
    if (path / "model.mil").is_file():
        return Package(path, path, text.read_compiled(path))
    if path.is_file():
        return Package(path, path.parent, proto.read_model(path))
    raise PackageError(f"{path}: holds neither Manifest.json (an .mlpackage) nor model.mil (an .mlmodelc)")


def specification_path(package: Path) -> Path:
    """The root model's file in an .mlpackage, by its Manifest.json. Raises PackageError where that is damaged, of
    an unknown format, or names a file outside the package."""
    manifest = package / "Manifest.json"
    data = strict_json.read(manifest, PackageError)
    try:
        version, items, root = data["fileFormatVersion"], data["itemInfoEntries"], data["rootModelIdentifier"]
        relative = items[root]["path"]
    except (KeyError, TypeError) as error:
        raise PackageError(f"{manifest}: not a package's manifest: {error!s} is missing") from error
    if not isinstance(version, str) or version.split(".")[0] != _FORMAT.split(".")[0]:
        raise PackageError(f"{manifest}: package format {version!r}, expected {_FORMAT}")
    for item in items.values():
        _check_item(item, package)
    specification = _inside(package / "Data" / relative, package / "Data", package)
    if not specification.is_file():
        raise PackageError(f"{package}: the model {relative} is missing")
    return specification


def write_package(model: Model, path: Path, weights: Path | None = None) -> None:
    """Write an .mlpackage; an existing one at ``path`` is replaced once the new one is complete. Raises
    StorageError for what the disk refuses.

    ``weights`` is a finished weight file, which is moved into the package as ``weights/weight.bin``. The same model
    and weights always give the same files.
    """
    with unfinished_folder(path) as unfinished:
        folder = unfinished / "Data" / _AUTHOR
        folder.mkdir(parents=True)
        proto.write_model(model, folder / "model.mlmodel")
        if weights is not None:
            (folder / "weights").mkdir()
            shutil.move(weights, folder / "weights" / "weight.bin")
        (unfinished / "Manifest.json").write_text(_manifest(weights is not None), encoding="utf-8")


def _manifest(weights: bool) -> str:
    described = {_MODEL: "Specification", **({_WEIGHTS: "Weights"} if weights else {})}
    items = {
        _identifier(path): {
            "author": _AUTHOR,
            "description": f"CoreML Model {what}",
            "name": PurePosixPath(path).name,
            "path": path,
        }
        for path, what in described.items()
    }
    manifest = {"fileFormatVersion": _FORMAT, "itemInfoEntries": items, "rootModelIdentifier": _identifier(_MODEL)}
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"


def _identifier(path: str) -> str:
    # coremltools draws them anew at each save: the same model would give another package.
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()


def _check_item(item: Any, package: Path) -> None:
    relative = item.get("path") if isinstance(item, dict) else None
    if not isinstance(relative, str) or not relative:
        raise PackageError(f"{package}: an item of Manifest.json has no path")
    _inside(package / "Data" / relative, package / "Data", package)


def _inside(path: Path, folder: Path, source: Path) -> Path:
    if "\0" in str(path) or not is_inside(path, folder):
        raise PackageError(f"{source}: {path} leads outside of {folder}; the model is refused")
    return path
