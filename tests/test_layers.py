"""The layers of the architecture: convert may import runtime, never the other way; mil stands alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
        f"diffusion_runtime.{name}"
        for name in (
            "mil",
            "atomic",
            "errors",
            "coremltools_import",
            "later",
            "memory",
            "families",
            "real_path",
            "strict_json",
        )
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
    assert touching == {
        f"runtime/diffusion_runtime/mil/{name}.py" for name in ("description", "proto", "proto_tensors")
    }


@pytest.mark.parametrize("package", ["diffusion_runtime", "diffusion_convert"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print([m for m in ('torch', 'coremltools', 'diffusers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_the_command_begins_without_numpy() -> None:
    """`--help` takes twice as long with it."""
    heavy = "[m for m in ('numpy', 'pydantic', 'PIL') if m in sys.modules]"
    code = f"import sys, diffusion_convert.cli.main; print({heavy})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


HEAVY = frozenset(
    {
        *("coremltools", "diffusers", "fastapi", "google", "gradio", "huggingface_hub", "matplotlib", "rich"),
        *("pyarrow", "ray", "safetensors", "scipy", "torch", "transformers", "yaml"),
    }
)
"""Libraries that take long to import, or are needed for few inputs: functions may import them."""
HEAVY_AT_START = frozenset({"PIL", "importlib.metadata", "numpy", "pydantic"})
"""What is too heavy for the start of a command alone."""
START = ("diffusion_convert.cli", "diffusion_runtime.cli")
"""The commands' modules; beside them, the packages themselves are loaded at the start."""
NOT_EVERYWHERE = frozenset({"fcntl", "gguf"})
"""A module of Python that not every system has, and a package that is an extra."""


def own_modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package in (CONVERT, RUNTIME):
        for path in sources(package):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = own_modules()


def imports(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """(module, whether a function imports it, whether only type checkers do) for every import of a file."""

    def below(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[tuple[str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, in_function, for_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                names = (f"{child.module}.{alias.name}" for alias in child.names)
                yield from (
                    (name if name in MODULES else child.module or "", in_function, for_types) for name in names
                )
            else:
                function = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                types = for_types or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
                yield from below(child, function, types)

    return below(ast.parse(path.read_text(encoding="utf-8")), in_function=False, for_types=False)


def test_modules_form_no_circle() -> None:
    """Whoever imports it: the module, a function of it, or type checkers alone."""
    graph = {
        name: {other for other, *_ in imports(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) == len(MODULES)


def loaded_with(name: str, known: dict[str, set[str]]) -> set[str]:
    """The libraries that come with importing a module of ours: its own and those of the modules that it imports."""
    if name not in known:
        known[name] = set()
        for other, in_function, for_types in imports(MODULES[name]):
            if not in_function and not for_types:
                known[name] |= loaded_with(other, known) if other in MODULES else {other, other.partition(".")[0]}
    return known[name]


def test_functions_import_heavy_libraries_only() -> None:
    """And those modules of ours that come with one. Everything else stands at the top, where a reader sees it."""
    wrong, known = [], dict[str, set[str]]()
    for name, path in MODULES.items():
        at_start = name.startswith(START) or "." not in name
        allowed = HEAVY | NOT_EVERYWHERE | (HEAVY_AT_START if at_start else frozenset())
        for other, in_function, _ in imports(path):
            libraries = loaded_with(other, known) if other in MODULES else {other, other.partition(".")[0]}
            if in_function and not libraries & allowed:
                wrong.append(f"{path.relative_to(ROOT)}: a function imports {other}: import it at the top")
    assert wrong == []
