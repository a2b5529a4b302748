"""The Core ML backend, against a stand-in whose signatures are those of the installed coremltools."""

from __future__ import annotations

import inspect
import json
import operator
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_runtime.backends import ComputeUnits, load_backend, resolve
from diffusion_runtime.backends.coreml import CACHE_VARIABLE, CoreMLBackend, content_key, default_cache
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import DiffusionError, InputError, InstallationError, PackageError

X = np.ones((2, 64), np.float16)
CALLS = (
    "models.MLModel.__init__",
    "models.MLModel.predict",
    "models.CompiledMLModel.__init__",
    "models.CompiledMLModel.predict",
    "models.utils.compile_model",
)


@pytest.mark.parametrize("name", CALLS)
def test_the_stand_in_has_coremltools_signatures(stand_in: Any, name: str) -> None:
    import_coremltools("models.utils")
    real, recorded = (operator.attrgetter(name)(module) for module in (import_coremltools(), stand_in.module()))
    assert list(inspect.signature(recorded).parameters) == list(inspect.signature(real).parameters)


def test_the_stand_in_has_coremltools_compute_units(stand_in: Any) -> None:
    real = {unit.name: unit.value for unit in import_coremltools().ComputeUnit}
    assert {unit.name: unit.value for unit in stand_in.module().ComputeUnit} == real


def test_a_package_is_compiled_once(stand_in: Any, small_package: Path, tmp_path: Path) -> None:
    backend = CoreMLBackend(tmp_path / "cache")
    for _ in range(2):
        backend.load(small_package, ComputeUnits.ALL)
    compiled = tmp_path / "cache" / f"{content_key(small_package)}.mlmodelc"
    assert stand_in.compiled == [str(small_package)]
    assert stand_in.opened == [("compiled", str(compiled), "ALL")] * 2
    assert [entry.name for entry in (tmp_path / "cache").glob("*")] == [compiled.name]


def test_the_key_is_the_content_not_the_name_nor_the_identifiers(small_package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.mlpackage"
    shutil.copytree(small_package, copy)
    manifest = json.loads((copy / "Manifest.json").read_text())
    (copy / "Manifest.json").write_text(json.dumps({**manifest, "note": "saved again"}))
    assert content_key(copy) == content_key(small_package)
    weights = next(copy.rglob("weight.bin"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert content_key(copy) != content_key(small_package)


@pytest.mark.parametrize("units", ComputeUnits)
def test_compute_units_reach_core_ml(
    stand_in: Any, small_package: Path, tmp_path: Path, units: ComputeUnits
) -> None:
    CoreMLBackend(tmp_path).load(small_package, units)
    assert stand_in.opened[-1][2] == units.value.upper().replace("-", "_")


def test_arrays_go_in_and_come_out_by_name(stand_in: Any, small_package: Path, tmp_path: Path) -> None:
    model = CoreMLBackend(tmp_path).load(small_package, ComputeUnits.ALL)
    (result,) = model(x=X).values()
    assert result.shape == (2, 64)
    assert np.array_equal(stand_in.predictions[0]["x"], X)
    assert (model.inputs["x"].shape, model.inputs["x"].dtype) == ((2, 64), "float16")
    assert (model.outputs["y"].shape, model.outputs["y"].dtype) == ((2, 64), "float16")


def test_wrong_arrays_are_all_named_before_core_ml_sees_them(
    stand_in: Any, small_package: Path, tmp_path: Path
) -> None:
    model = CoreMLBackend(tmp_path).load(small_package, ComputeUnits.ALL)
    with pytest.raises(InputError, match=r"missing x; unknown z"):
        model(z=X)
    with pytest.raises(InputError, match=r"x has shape \(1, 64\), expected \(2, 64\)"):
        model(x=X[:1])
    assert stand_in.predictions == []


def test_where_nothing_can_be_cached_the_package_itself_is_loaded(
    stand_in: Any, small_package: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    CoreMLBackend(tmp_path / "file" / "cache").load(small_package, ComputeUnits.CPU_ONLY)
    assert stand_in.opened == [("package", str(small_package), "CPU_ONLY")]


def test_a_damaged_compiled_model_is_made_anew(
    stand_in: Any, small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / f"{content_key(small_package)}.mlmodelc"
    cached.mkdir()
    whole = stand_in.raise_if

    def refuse_empty(call: str) -> None:
        if call == "load" and not list(cached.iterdir()):
            raise RuntimeError("not a compiled model")
        whole(call)

    monkeypatch.setattr(stand_in, "raise_if", refuse_empty)
    CoreMLBackend(tmp_path).load(small_package, ComputeUnits.ALL)
    assert stand_in.compiled == [str(small_package)] and stand_in.opened == [("compiled", str(cached), "ALL")]


def test_another_process_may_compile_the_same_package_first(
    stand_in: Any, small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / f"{content_key(small_package)}.mlmodelc"
    whole = stand_in.raise_if

    def overtake(call: str) -> None:
        if call == "compile":
            shutil.copytree(small_package, cached)
        whole(call)

    monkeypatch.setattr(stand_in, "raise_if", overtake)
    CoreMLBackend(tmp_path).load(small_package, ComputeUnits.ALL)
    assert stand_in.opened == [("compiled", str(cached), "ALL")] and list(tmp_path.iterdir()) == [cached]


@pytest.mark.parametrize("call", ["load", "compile"])
def test_what_core_ml_refuses_is_one_line_and_leaves_nothing(
    stand_in: Any, small_package: Path, tmp_path: Path, call: str
) -> None:
    stand_in.fails = call
    with pytest.raises(PackageError, match=rf"small.mlpackage: Core ML cannot load it: .*{call} failed$"):
        CoreMLBackend(tmp_path / "cache").load(small_package, ComputeUnits.ALL)
    left = [entry.name for entry in (tmp_path / "cache").glob("*")]
    assert [name for name in left if not name.startswith(content_key(small_package))] == []


def test_a_failing_prediction_says_what_to_try(stand_in: Any, small_package: Path, tmp_path: Path) -> None:
    model = CoreMLBackend(tmp_path).load(small_package, ComputeUnits.ALL)
    stand_in.fails = "predict"
    with pytest.raises(DiffusionError, match="predict failed; try other compute units"):
        model(x=X)


def test_a_damaged_package_never_reaches_core_ml(stand_in: Any, small_package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mlpackage"
    shutil.copytree(small_package, broken)
    specification = next(broken.rglob("model.mlmodel"))
    specification.write_bytes(specification.read_bytes()[:50])
    with pytest.raises(PackageError):
        CoreMLBackend(tmp_path / "cache").load(broken, ComputeUnits.ALL)
    assert stand_in.opened == stand_in.compiled == []


def test_other_systems_are_told_what_to_use(
    small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    with pytest.raises(InstallationError, match="needs macOS; use `--backend torch`"):
        CoreMLBackend(tmp_path).load(small_package, ComputeUnits.ALL)


def test_the_cache_can_be_put_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "here"))
    assert default_cache() == tmp_path / "here"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert default_cache().parts[-2:] == ("coreml-sd", "compiled")


@pytest.mark.parametrize(("system", "name"), [("darwin", "coreml"), ("linux", "torch")])
def test_auto_is_coreml_on_macos_and_torch_elsewhere(
    monkeypatch: pytest.MonkeyPatch, system: str, name: str
) -> None:
    monkeypatch.setattr("sys.platform", system)
    assert resolve("auto") == name


def test_unknown_backends_and_misplaced_options_are_refused() -> None:
    with pytest.raises(InputError, match="unknown backend 'tpu': expected one of auto, coreml, torch"):
        load_backend("tpu")
    with pytest.raises(InputError, match="dtype can be chosen with the torch backend only"):
        load_backend("coreml", dtype="float16")


@pytest.mark.coreml
@pytest.mark.parametrize("units", [ComputeUnits.CPU_ONLY, ComputeUnits.ALL])
def test_core_ml_computes_what_torch_computes(small_package: Path, tmp_path: Path, units: ComputeUnits) -> None:
    if platform.system() != "Darwin":
        pytest.skip("needs macOS with Core ML")
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float16)
    model = CoreMLBackend(tmp_path).load(small_package, units)
    again = CoreMLBackend(tmp_path).load(small_package, units)
    expected = load_backend("torch").load(small_package, units)(x=x)["y"]
    assert np.abs(model(x=x)["y"] - expected).max() < 0.05
    assert np.array_equal(model(x=x)["y"], again(x=x)["y"])
