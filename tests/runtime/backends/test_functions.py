"""Models of several functions: one taken out, several joined, and what coremltools reads of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_convert.join import join, share, take_apart
from diffusion_runtime.backends import ComputeUnits
from diffusion_runtime.backends.coreml import CoreMLBackend
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.mil import proto
from diffusion_runtime.mil.functions import function_names
from diffusion_runtime.mil.package import open_package

ROWS = {"rows_2": 2, "rows_3": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``y = x @ w + b`` for two and for three rows, for macOS 15; b is of the rows, w of both."""
    folder = tmp_path_factory.mktemp("parts")
    return {name: _save(folder / f"{name}.mlpackage", rows) for name, rows in ROWS.items()}


@pytest.fixture(scope="module")
def whole(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("joined") / "joined.mlpackage"
    join(parts, path)
    return path


def _save(path: Path, rows: int, target: str = "iOS18") -> Path:
    ct, builder = import_coremltools(), import_coremltools("converters.mil").Builder
    types, numbers = import_coremltools("converters.mil.mil.types"), np.random.default_rng(0)
    weight = numbers.standard_normal((64, 64)).astype(np.float16)
    bias = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float16)

    @builder.program(  # type: ignore[untyped-decorator]
        input_specs=[builder.TensorSpec((rows, 64), dtype=types.fp16)], opset_version=getattr(ct.target, target)
    )
    def program(x: Any) -> Any:
        return builder.add(x=builder.matmul(x=x, y=weight), y=bias, name="y")

    ct.convert(
        program,
        minimum_deployment_target=getattr(ct.target, target),
        compute_precision=ct.precision.FLOAT16,
        skip_model_load=True,
    ).save(str(path))
    return path


def _x(rows: int) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((rows, 64)).astype(np.float16)


def _weights(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


def test_each_function_computes_what_its_package_does(parts: dict[str, Path], whole: Path) -> None:
    backend = TorchBackend()
    for name, rows in ROWS.items():
        expected, found = backend.load(parts[name])(x=_x(rows)), backend.load(whole, function=name)(x=_x(rows))
        np.testing.assert_array_equal(found["y"], expected["y"])
    assert backend.load(whole).inputs["x"].shape == (2, 64), "the first is the default"


def test_what_is_equal_is_stored_once(parts: dict[str, Path], whole: Path) -> None:
    own = [_weights(path).stat().st_size for path in parts.values()]
    assert max(own) < _weights(whole).stat().st_size < sum(own) - 64 * 64 * 2 + 1
    again = whole.parent / "alike.mlpackage"
    join({"a": parts["rows_2"], "b": parts["rows_2"]}, again)
    assert _weights(again).samefile(_weights(parts["rows_2"])), "equal files are hard links"


def test_coremltools_reads_the_functions(whole: Path) -> None:
    ct = import_coremltools()
    model = ct.models.MLModel(str(whole), skip_model_load=True, function_name="rows_3")
    assert model._is_multifunction()
    described = model._get_function_description("rows_3")
    assert list(described.input[0].type.multiArrayType.shape) == [3, 64]
    with pytest.raises(ValueError, match="rows_4 not found"):
        ct.models.MLModel(str(whole), skip_model_load=True, function_name="rows_4")
    spec = model.get_spec()
    assert spec.specificationVersion == 9
    assert spec.description.defaultFunctionName == "rows_2"
    assert not spec.description.input
    assert [function.name for function in spec.description.functions] == list(ROWS)
    assert sorted(spec.mlProgram.functions) == sorted(ROWS)


def test_what_coremltools_joins_is_read(parts: dict[str, Path], tmp_path: Path) -> None:
    """Its own way of sharing weights; ours must read the same functions of it."""
    utils = import_coremltools("models.utils")
    described = utils.MultiFunctionDescriptor()
    for name, path in parts.items():
        described.add_function(str(path), src_function_name="main", target_function_name=name)
    described.default_function_name = "rows_2"
    utils.save_multifunction(described, str(tmp_path / "theirs.mlpackage"))
    theirs = open_package(tmp_path / "theirs.mlpackage")
    assert function_names(theirs.model) == tuple(ROWS)
    found = TorchBackend().load(theirs.path, function="rows_3")(x=_x(3))
    np.testing.assert_array_equal(found["y"], TorchBackend().load(parts["rows_3"])(x=_x(3))["y"])


def test_a_function_is_a_package_again(parts: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    take_apart(whole, "rows_3", tmp_path / "one.mlpackage")
    one = open_package(tmp_path / "one.mlpackage")
    own = open_package(parts["rows_3"])
    assert one.model.description == own.of(None).model.description
    assert one.model.interface == own.model.interface
    assert _weights(one.path).samefile(_weights(whole))
    found = TorchBackend().load(one.path)(x=_x(3))
    np.testing.assert_array_equal(found["y"], TorchBackend().load(parts["rows_3"])(x=_x(3))["y"])
    assert proto.model_from_bytes(proto.model_to_bytes(one.model)) == one.model


def test_older_systems_get_packages_with_one_weight_file(tmp_path: Path) -> None:
    old = [_save(tmp_path / f"{rows}.mlpackage", rows, "iOS16") for rows in (2, 3)]
    outputs = [tmp_path / "out/one.mlpackage", tmp_path / "out/deeper/other.mlpackage"]
    share(old, outputs)
    assert _weights(outputs[0]).samefile(_weights(outputs[1]))
    for rows, before, after in zip((2, 3), old, outputs, strict=True):
        expected, found = (TorchBackend().load(path)(x=_x(rows))["y"] for path in (before, after))
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="specifications 7: expected one, 9 or later"):
        join({"a": old[0], "b": old[1]}, tmp_path / "never.mlpackage")
    assert not (tmp_path / "never.mlpackage").exists()


def test_an_unknown_function_is_named_with_the_known_ones(parts: dict[str, Path], whole: Path) -> None:
    with pytest.raises(InputError, match=r"joined.mlpackage: no function 'rows_4': the model has rows_2, rows_3"):
        TorchBackend().load(whole, function="rows_4")
    with pytest.raises(InputError, match=r"no function 'rows_2': the model has main"):
        TorchBackend().load(parts["rows_2"], function="rows_2")


def test_a_described_function_must_be_there(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mlpackage"
    shutil.copytree(whole, copy)
    path = copy / "Data/com.apple.CoreML/model.mlmodel"
    spec = import_coremltools("proto").Model_pb2.Model.FromString(path.read_bytes())
    del spec.mlProgram.functions["rows_3"]
    path.write_bytes(spec.SerializeToString())
    with pytest.raises(PackageError, match="function rows_3 is described, the program has rows_2"):
        TorchBackend().load(copy)


def test_core_ml_is_asked_for_the_function(
    stand_in: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CoreMLBackend(tmp_path / "cache")
    stand_in.answers = {"y": np.zeros((3, 64), np.float32)}
    model = backend.load(whole, ComputeUnits.ALL, "rows_3")
    assert model.inputs["x"].shape == (3, 64)
    assert model(x=_x(3))["y"].shape == (3, 64)
    backend.load(whole, ComputeUnits.ALL)
    assert stand_in.functions == ["rows_3", None]
    monkeypatch.setattr(CoreMLBackend, "_compiled", lambda *_: None)
    CoreMLBackend(tmp_path / "no").load(whole, ComputeUnits.ALL, "rows_2")
    assert stand_in.functions[-1] == "rows_2", "a package that could not be compiled, too"
    with pytest.raises(InputError, match="no function 'rows_4'"):
        backend.load(whole, ComputeUnits.ALL, "rows_4")
