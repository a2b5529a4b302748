"""What the compiler does not cover is refused by name, all at once, and nothing is written."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_convert.compile import Compiler, compile_package, op_versions
from diffusion_runtime.errors import InputError, PackageError, StorageError, UnsupportedError
from diffusion_runtime.mil.description import serialize
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.package import write_package
from diffusion_runtime.mil.program import (
    Blob,
    Block,
    DType,
    Feature,
    Function,
    FunctionInterface,
    Operation,
    Program,
    TensorType,
    Value,
    Variable,
)
from diffusion_runtime.mil.weights import WeightWriter

VECTOR = TensorType(DType.FLOAT32, (4,))
INPUT = Feature("x", "multiArray", "Float32", (4,))


def model(*operations: Operation) -> Model:
    """``y = relu(x)``, with ``operations`` before it."""
    relu = Operation("relu", {"x": ("x",)}, (Variable("y", VECTOR),))
    block = Block((*operations, relu), ("y",))
    program = Program({"main": Function((Variable("x", VECTOR),), "CoreML6", {"CoreML6": block})})
    interface = FunctionInterface("main", (INPUT,), (replace(INPUT, name="y"),))
    return Model(7, program, serialize((interface,)))


def operation(kind: str) -> Operation:
    return Operation(kind, {"x": ("x",)}, (Variable(f"{kind}_of_x", VECTOR),))


def of_function(**changes: object) -> Model:
    base = model()
    function = replace(base.program.functions["main"], **changes)  # type: ignore[arg-type]
    return replace(base, program=replace(base.program, functions={"main": function}))


def of_input(**changes: object) -> Model:
    base = model()
    feature = replace(INPUT, **changes)  # type: ignore[arg-type]
    return replace(base, description=serialize((replace(base.interface, inputs=(feature,)),)))


def with_state() -> Model:
    base = model()
    state = Feature("cache", "state", "Float16", (4,))
    described = serialize((replace(base.interface, states=(state,)),))
    return replace(base, specification_version=9, description=described)


def two_functions() -> Model:
    base = model()
    main = base.program.functions["main"]
    return replace(base, program=replace(base.program, functions={"main": main, "other": main}))


TEXT = Value(TensorType(DType.STRING), 'say "hi"')
REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "specification": (lambda: replace(model(), specification_version=10), "version 10 (known: 6, 7, 8, 9)"),
    "updatable": (lambda: replace(model(), is_updatable=True), "an updatable model"),
    "unbounded": (lambda: of_input(shape_range=((1, -1),)), "x has an unbounded shape"),
    "state": (with_state, "state cache"),
    "functions": (two_functions, "functions main, other (known: a single main)"),
    "nested blocks": (lambda: model(replace(operation("cond"), blocks=(Block((), ()),))), "nested blocks of cond"),
    "operations": (lambda: model(operation("mystery"), operation("enigma")), "unknown operations enigma, mystery"),
    "escapes": (lambda: model(replace(operation("relu"), attributes={"name": TEXT})), "strings that need escapes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    make, expected = REFUSED[name]
    write_package(make(), tmp_path / "a.mlpackage")
    with pytest.raises(UnsupportedError, match=r"a\.mlpackage: cannot be compiled here") as caught:
        compile_package(tmp_path / "a.mlpackage", tmp_path / "out")
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_everything_is_listed_at_once(tmp_path: Path) -> None:
    base = with_state()
    block = model(operation("mystery"), replace(operation("cond"), blocks=(Block((), ()),))).program
    write_package(replace(base, program=block), tmp_path / "a.mlpackage")
    with pytest.raises(UnsupportedError, match=r"state cache; nested blocks of cond; unknown operations mystery"):
        compile_package(tmp_path / "a.mlpackage", tmp_path)


def test_a_package_whose_weights_are_cut_short_is_refused(tmp_path: Path) -> None:
    value = Value(TensorType(DType.FLOAT16, (64,)), Blob("@model_path/weights/weight.bin", 64))
    const = Operation("const", {}, (Variable("w", value.type),), {"val": value})
    (tmp_path / "weight.bin").write_bytes(bytes([1, 0, 0, 0, 2]).ljust(100, b"\0"))
    write_package(model(const), tmp_path / "a.mlpackage", tmp_path / "weight.bin")
    with pytest.raises(PackageError, match=r"weight\.bin: blob at offset 64"):
        compile_package(tmp_path / "a.mlpackage", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_operation_that_was_only_inferred_is_reported(tmp_path: Path) -> None:
    write_package(model(operation("erf")), tmp_path / "a.mlpackage")
    compiled = compile_package(tmp_path / "a.mlpackage", tmp_path)
    assert compiled.inferred == ("erf",)
    assert compiled.path == tmp_path / "a.mlmodelc"


def test_an_older_compiled_model_is_replaced_and_a_failed_one_left(tmp_path: Path) -> None:
    write_package(model(), tmp_path / "a.mlpackage")
    path = compile_package(tmp_path / "a.mlpackage", tmp_path, "Model").path
    (path / "stale").touch()
    assert compile_package(tmp_path / "a.mlpackage", tmp_path, "Model").path == path
    before = sorted(item.name for item in path.iterdir())
    assert before == ["analytics", "coremldata.bin", "metadata.json", "model.mil"]
    write_package(model(operation("mystery")), tmp_path / "a.mlpackage")
    with pytest.raises(UnsupportedError):
        compile_package(tmp_path / "a.mlpackage", tmp_path, "Model")
    assert sorted(item.name for item in path.iterdir()) == before


def test_places_that_would_do_harm_are_refused(tmp_path: Path) -> None:
    package = tmp_path / "a.mlpackage"
    write_package(model(), package)
    (tmp_path / "file").touch()
    (tmp_path / "kept.mlmodelc").mkdir()
    (tmp_path / "kept.mlmodelc" / "diary.txt").touch()
    (tmp_path / "a.mlmodelc").touch()
    before = sorted(tmp_path.rglob("*"))
    for folder, name, expected in (
        (tmp_path / "file", None, "file: is a file; expected a folder"),
        (tmp_path / "file" / "inside", None, "file: is a file; expected a folder"),
        (package / "Data", None, "would lie in each other"),
        (tmp_path, "kept", "is no compiled model"),
        (tmp_path, None, "is a file"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            compile_package(package, folder, name)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_one_line_and_leaves_the_older_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(model(), tmp_path / "a.mlpackage")
    path = compile_package(tmp_path / "a.mlpackage", tmp_path).path

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"a\.mlmodelc: the disk is full"):
        compile_package(tmp_path / "a.mlpackage", tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.mlmodelc", "a.mlpackage"]
    assert (path / "model.mil").is_file()


def test_weights_are_copied_so_that_changing_the_package_changes_no_compiled_model(tmp_path: Path) -> None:
    value = Value(TensorType(DType.FLOAT16, (4,)), Blob("@model_path/weights/weight.bin", 64))
    const = Operation("const", {}, (Variable("w", value.type),), {"val": value})
    with WeightWriter(tmp_path / "weight.bin") as writer:
        writer.add(np.ones(4, "<f2"), DType.FLOAT16)
    write_package(model(const), tmp_path / "a.mlpackage", tmp_path / "weight.bin")
    (source,) = (tmp_path / "a.mlpackage").rglob("weight.bin")
    for share in (False, True):
        path = compile_package(tmp_path / "a.mlpackage", tmp_path / str(share), share_weights=share).path
        assert (path / "weights" / "weight.bin").samefile(source) == share


@pytest.mark.parametrize("opset", [15, 16, 17, 18])
def test_every_operation_of_coremltools_has_a_key(opset: int) -> None:
    from diffusion_runtime.coremltools_import import import_coremltools

    import_coremltools("converters.mil.mil.ops.defs")
    registry = import_coremltools("converters.mil.mil.ops.registry").SSAOpRegistry.core_ops
    counted = {
        name for name in registry if name not in ("const", "cond", "while_loop") and not name.startswith("_")
    }
    assert {name for name in counted if op_versions.histogram_key(name, opset) is None} == set()


@pytest.mark.parametrize(
    ("operation_type", "opset", "key"),
    [
        ("einsum", 16, "Ios16.einsum"),
        ("einsum", 18, "Ios16.einsum"),
        ("slice_by_index", 16, "SliceByIndex"),
        ("slice_by_index", 17, "Ios17.sliceByIndex"),
        ("constexpr_lut_to_dense", 17, "Ios16.constexprLutToDense"),
        ("conv", 15, "Conv"),
    ],
)
def test_keys_follow_the_newest_redefinition_that_is_reached(operation_type: str, opset: int, key: str) -> None:
    found = op_versions.histogram_key(operation_type, opset)
    assert found == op_versions.Key(key, observed=True)


def test_xcrun_is_called_with_an_argument_list_and_its_status_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(model(), tmp_path / "a;b.mlpackage")
    calls = []

    def fake(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert "shell" not in options
        calls.append(command)
        (Path(command[-1]) / "a;b.mlmodelc").mkdir()
        (Path(command[-1]) / "a;b.mlmodelc" / "model.mil").touch()
        return subprocess.CompletedProcess(command, len(calls) - 1, "", "first line\nsecond line")

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("subprocess.run", fake)
    path = compile_package(tmp_path / "a;b.mlpackage", tmp_path, "Unet", Compiler.XCRUN).path
    assert path == tmp_path / "Unet.mlmodelc"
    assert [item.name for item in path.iterdir()] == ["model.mil"]
    assert calls[0][:4] == ["xcrun", "coremlcompiler", "compile", str(tmp_path / "a;b.mlpackage")]
    with pytest.raises(PackageError, match="failed with status 1: first line second line"):
        compile_package(tmp_path / "a;b.mlpackage", tmp_path, "Unet", Compiler.XCRUN)
    assert path.is_dir()


def test_xcrun_needs_macos_and_a_compiled_model_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(InputError, match="needs macOS"):
        compile_package(tmp_path / "a.mlpackage", tmp_path, compiler=Compiler.XCRUN)
    with pytest.raises(InputError, match="is compiled already"):
        compile_package(tmp_path / "a.mlmodelc", tmp_path)
