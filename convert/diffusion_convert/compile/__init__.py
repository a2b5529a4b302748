""".mlpackage -> .mlmodelc on any operating system, without Xcode; on macOS Apple's compiler can be asked instead.

A compiled model is a folder: ``model.mil`` (the program as text), the package's weight files unchanged,
``coremldata.bin``, ``analytics/coremldata.bin`` and ``metadata.json``. A package always gives the same bytes.
"""

from __future__ import annotations

import enum
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_convert.compile import coremldata, coverage
from diffusion_convert.compile.metadata_json import metadata_json
from diffusion_convert.compile.mil_text import compiled_program, dialect
from diffusion_runtime.atomic import unfinished_folder
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.links import share_file
from diffusion_runtime.mil.package import Package, open_package, resolve, specification_path
from diffusion_runtime.mil.program import Blob, Function, operations
from diffusion_runtime.mil.text import TEXT_NAME
from diffusion_runtime.mil.text_print import program_text
from diffusion_runtime.real_path import real_path

COMPILER_VERSIONS = {"coremlc-component-MIL": "3500.14.1", "coremlc-version": "3500.32.1"}
"""What Apple's compiler notes of itself in model.mil: of the version whose output is reproduced. Core ML loads
models with any text here. Who compiled ours is told by its user metadata, ``coreml_sd.version``."""


class Compiler(enum.Enum):
    """The value is the spelling on the command line."""

    PYTHON = "python"
    XCRUN = "xcrun"


@dataclass(frozen=True, slots=True)
class Compiled:
    """``inferred`` lists operations whose histogram key was inferred and never seen in a real compiled model."""

    path: Path
    inferred: tuple[str, ...] = ()


def compile_package(
    package: Path,
    folder: Path,
    name: str | None = None,
    compiler: Compiler = Compiler.PYTHON,
    versions: Mapping[str, str] = COMPILER_VERSIONS,
    share_weights: bool = False,
) -> Compiled:
    """Compile ``package`` to ``folder/{name}.mlmodelc`` (name: the package's own), replacing an older one.

    Weight files are copied, or with ``share_weights`` hard links where the file system has them: then writing into
    the package's file would change the compiled model. Raises UnsupportedError that names everything whose compiled
    form is not known, PackageError for a damaged package, InputError for a place that cannot be written to; then
    nothing is written.
    """
    if package.suffix == ".mlmodelc":
        raise InputError(f"{package}: is compiled already; expected an .mlpackage")
    target = folder / f"{name or package.stem}.mlmodelc"
    _check_place(target, package)
    if compiler is Compiler.XCRUN:
        return _compile_with_xcrun(package, target)
    opened = open_package(package)
    coverage.check(opened.model, package)
    function = opened.model.program.functions["main"]
    weights = check_weights(opened, function)
    specification = specification_path(package) if package.is_dir() else package
    with unfinished_folder(target) as unfinished:
        program = compiled_program(opened.model, versions)
        text = program_text(program, dialect(opened.model.specification_version))
        (unfinished / TEXT_NAME).write_text(text, encoding="utf-8", newline="\n")
        (unfinished / "coremldata.bin").write_bytes(coremldata.container(opened.model))
        (unfinished / "analytics").mkdir()
        analytics = coremldata.analytics(specification.read_bytes(), specification.stem)
        (unfinished / "analytics" / "coremldata.bin").write_bytes(analytics)
        (unfinished / "metadata.json").write_text(metadata_json(opened.model, target.stem), encoding="utf-8")
        for path in sorted(weights):
            source = resolve(opened.root, path, package)
            _put(source, unfinished / source.relative_to(opened.root), share_weights)
    return Compiled(target, coverage.inferred_versions(function))


def _check_place(target: Path, package: Path) -> None:
    """Raise InputError where the compiled model would lie in a file or in its own package, or replace something
    that is no compiled model."""
    above = next((place for place in (target.parent, *target.parent.parents) if place.exists()), target.parent)
    if above.exists() and not above.is_dir():
        raise InputError(f"{above}: is a file; expected a folder for the compiled model")
    where, source = real_path(target), real_path(package)
    if where.is_relative_to(source) or source.is_relative_to(where):
        raise InputError(f"{target}: the compiled model and {package} would lie in each other; name another folder")
    ours = ("model.mil", "coremldata.bin")
    if target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in ours):
        raise InputError(f"{target}: exists and is no compiled model; remove it or choose another name")


def _put(source: Path, target: Path, share: bool) -> None:
    if share:
        share_file(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def check_weights(package: Package, function: Function) -> frozenset[str]:
    """The weight files of ``function``, as its blobs name them. Raises PackageError for one that is not whole."""
    paths = set()
    for operation in operations(function.block):
        for _, value in operation.values:
            if isinstance(value.data, Blob):
                package.check_blob(value)
                paths.add(value.data.path)
    return frozenset(paths)


def _compile_with_xcrun(package: Path, target: Path) -> Compiled:
    if platform.system() != "Darwin":
        raise InputError("--compiler xcrun needs macOS with Xcode; here use --compiler python")
    with unfinished_folder(target) as unfinished:
        command = ["xcrun", "coremlcompiler", "compile", str(package), str(unfinished)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        produced = unfinished / f"{package.stem}.mlmodelc"
        if result.returncode or not produced.is_dir():
            reason = (result.stderr or result.stdout).strip().replace("\n", " ")
            raise PackageError(f"{package}: xcrun coremlcompiler failed with status {result.returncode}: {reason}")
        # xcrun names its result after the package.
        for entry in list(produced.iterdir()):
            entry.rename(unfinished / entry.name)
        produced.rmdir()
    return Compiled(target)
