""".mlpackage -> .mlmodelc on any operating system, without Xcode; on macOS Apple's compiler can be asked instead.

A compiled model is a folder: ``model.mil`` (the program as text), the package's weight files unchanged,
``coremldata.bin``, ``analytics/coremldata.bin`` and ``metadata.json``. A package always gives the same bytes.
"""

from __future__ import annotations

import enum
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_convert.compile import coremldata, coverage
from diffusion_convert.compile.metadata_json import metadata_json
from diffusion_convert.compile.mil_text import compiled_program, dialect
from diffusion_convert.compile.op_versions import histogram_key
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.folders import share_file, unfinished_folder
from diffusion_runtime.mil.package import Package, open_package, resolve, specification_path
from diffusion_runtime.mil.program import Blob, Function, TensorType, Value, operations
from diffusion_runtime.mil.text import TEXT_NAME, write_text

COMPILER_VERSIONS = {"coremlc-component-MIL": "3500.14.1", "coremlc-version": "3500.32.1"}
"""What Apple's compiler notes of itself in model.mil: of the version whose output is reproduced."""


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
) -> Compiled:
    """Compile ``package`` to ``folder/{name}.mlmodelc`` (name: the package's own), replacing an older one.

    Weight files are hard links where the file system has them. Raises UnsupportedError that names everything whose
    compiled form is not known, PackageError for a damaged package; then nothing is written.
    """
    if package.suffix == ".mlmodelc":
        raise InputError(f"{package}: is compiled already; expected an .mlpackage")
    target = folder / f"{name or package.stem}.mlmodelc"
    if compiler is Compiler.XCRUN:
        return _compile_with_xcrun(package, target)
    opened = open_package(package)
    coverage.check(opened.model, package)
    function = opened.model.program.functions["main"]
    blobs = _check_weights(opened, function)
    specification = specification_path(package) if package.is_dir() else package
    with unfinished_folder(target) as unfinished:
        program = compiled_program(opened.model, versions)
        write_text(program, unfinished / TEXT_NAME, dialect(opened.model.specification_version))
        (unfinished / "coremldata.bin").write_bytes(coremldata.container(opened.model))
        (unfinished / "analytics").mkdir()
        analytics = coremldata.analytics(specification.read_bytes(), specification.stem)
        (unfinished / "analytics" / "coremldata.bin").write_bytes(analytics)
        (unfinished / "metadata.json").write_text(metadata_json(opened.model, target.stem), encoding="utf-8")
        for path in sorted({blob.path for blob in blobs}):
            source = resolve(opened.root, path, package)
            share_file(source, unfinished / source.relative_to(opened.root))
    return Compiled(target, _inferred(function))


def _check_weights(package: Package, function: Function) -> list[Blob]:
    """Every blob of ``function``, each found to be whole. Raises PackageError for one that is not."""
    blobs = []
    for operation in operations(function.block):
        inline = [item for bindings in operation.inputs.values() for item in bindings if isinstance(item, Value)]
        for value in (*operation.attributes.values(), *inline):
            if isinstance(value.data, Blob) and isinstance(value.type, TensorType):
                shape = tuple(size or 0 for size in value.type.shape)
                package.weight_file(value.data).packed(value.data.offset, value.type.dtype, shape)
                blobs.append(value.data)
    return blobs


def _inferred(function: Function) -> tuple[str, ...]:
    opset = coverage.opset_number(function.opset)
    types = {operation.type for operation in operations(function.block)}
    keys = {kind: histogram_key(kind, opset) for kind in types}
    return tuple(sorted(kind for kind, key in keys.items() if key is not None and not key.observed))


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
        for entry in list(produced.iterdir()):
            entry.rename(unfinished / entry.name)
        produced.rmdir()
    return Compiled(target)
