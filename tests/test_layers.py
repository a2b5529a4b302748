"""The layers of the architecture: convert may import runtime, never the other way; mil stands alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ROOT / "runtime" / "diffusion_runtime"
CONVERT = ROOT / "convert" / "diffusion_convert"


def imported_modules(source: Path) -> set[str]:
    """Absolute names of every module that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            names.add(node.value.partition(":")[0])  # "package.module:name", loaded on demand
    return names


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


@pytest.mark.parametrize("source", sources(RUNTIME), ids=lambda path: str(path.relative_to(RUNTIME)))
def test_runtime_never_imports_convert(source: Path) -> None:
    assert not {name for name in imported_modules(source) if name.startswith("diffusion_convert")}


@pytest.mark.parametrize("source", sources(RUNTIME / "mil"), ids=lambda path: path.stem)
def test_mil_imports_neither_pipeline_nor_backends(source: Path) -> None:
    allowed = tuple(
        f"diffusion_runtime.{name}" for name in ("mil", "errors", "coremltools_import", "families", "strict_json")
    )
    own = {name for name in imported_modules(source) if name.startswith("diffusion_runtime.")}
    assert {name for name in own if not name.startswith(allowed)} == set()


def test_the_tables_depend_on_nothing() -> None:
    names = imported_modules(RUNTIME / "families.py")
    assert not {name for name in names if name.startswith(("diffusion_", "torch", "numpy"))}


def test_only_proto_touches_protobuf() -> None:
    touching = {
        path.relative_to(ROOT).as_posix()
        for path in [*sources(RUNTIME), *sources(CONVERT)]
        if any(name.startswith(("google.protobuf", "coremltools.proto")) for name in imported_modules(path))
        or "_pb2" in path.read_text(encoding="utf-8")
    }
    assert touching == {f"runtime/diffusion_runtime/mil/{name}.py" for name in ("description", "proto")}


@pytest.mark.parametrize("package", ["diffusion_runtime", "diffusion_convert"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print([m for m in ('torch', 'coremltools', 'diffusers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
