"""`bench`: figures of the torch backend, and of Core ML through a stand-in whose units can be made to differ."""

from __future__ import annotations

import getpass
import inspect
import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusion_convert.cli.main import app
from diffusion_runtime.backends import ComputeUnits
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.performance import Measurement, pictures_per_minute
from small_bundle import write_bundle
from tiny_checkpoints import write_tokenizer

pytestmark = pytest.mark.usefixtures("loaded_anew")

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = write_bundle(tmp_path / "my secret models", ("original",))
    write_tokenizer(folder / "original" / "packages")
    return folder


def bench(*arguments: object) -> int:
    code = app(["bench", *map(str, arguments)], standalone_mode=False)
    return code if isinstance(code, int) else 0


def test_the_torch_backend_is_measured(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(models, "--backend", "torch", "--runs", 2, "--report", tmp_path / "report.json") == 0
    shown, said = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["measurements"]
    assert [row["component"] for row in rows] == list(COMPONENTS)
    for row in rows:
        assert row["component"] in shown and row["component"] in said
        assert row["load_seconds"] > 0 and row["first_call_seconds"] > 0 and row["steady_seconds"] > 0
        assert row["peak_memory_bytes"] > 1 << 20
        assert (row["psnr_db"], row["error"], row["compute_units"]) == (None, None, None)
    assert report["pictures_per_minute"].keys() == {"torch"}
    assert "pictures a minute of 20 steps" in shown
    assert report["models"]["family"] == "sd1" and report["models"]["components"]["unet"]["size_bytes"] > 0
    assert report["machine"]["memory_bytes"] > 1 << 30


def test_a_report_names_no_person_host_or_folder(models: Path, tmp_path: Path) -> None:
    shutil.rmtree(next((models / "original" / "packages").glob("*_vae_encoder.mlpackage")) / "Data")
    assert bench(models, "--backend", "torch", "--runs", 1, "--report", tmp_path / "report.json") == 1
    text = (tmp_path / "report.json").read_text()
    (failed,) = [row for row in json.loads(text)["measurements"] if row["error"]]
    assert failed["component"] == "vae_encoder"
    for told in (str(tmp_path), "my secret models", socket.gethostname(), "maker", str(Path.home()) + "/"):
        assert told not in text.replace("_maker_tiny", "")
    assert getpass.getuser() not in json.dumps(json.loads(text)["machine"])


@dataclass
class Mac:
    """coremltools on a Mac, as far as `bench` uses it: models compute what the torch backend computes, but for
    ``wrong``, compute units that give noise, and ``failing`` ones, which cannot load."""

    wrong: str = ""
    failing: str = ""
    plans: list[tuple[str, str]] = field(default_factory=list)

    def modules(self) -> Mapping[str, Any]:
        mac, units = self, import_coremltools().ComputeUnit

        class CompiledMLModel:
            def __init__(self, path: str, compute_units: Any = units.ALL, function_name: Any = None) -> None:
                assert function_name is None  # these models have one function
                if compute_units.name == mac.failing:
                    raise RuntimeError(f"{path}: Error Domain=com.apple.CoreML Code=0")
                self.units = compute_units.name
                self.model = TorchBackend().load(Path(Path(path, "source").read_text()))

            def predict(self, data: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:  # noqa: ARG002
                answers = self.model(**data)
                if self.units != mac.wrong:
                    return answers
                noise = np.random.default_rng(0)
                return {name: value + noise.standard_normal(value.shape) for name, value in answers.items()}

        def compile_model(model: str, destination_path: str | None = None) -> str:
            assert destination_path is not None
            Path(destination_path).mkdir()
            Path(destination_path, "source").write_text(model)
            return destination_path

        models = SimpleNamespace(
            CompiledMLModel=CompiledMLModel, utils=SimpleNamespace(compile_model=compile_model)
        )
        return {
            "": SimpleNamespace(ComputeUnit=units, models=models),
            "models.compute_plan": SimpleNamespace(MLComputePlan=self.plan_class()),
        }

    def plan_class(self) -> Any:
        """coremltools' MLComputePlan for a model of three operations, one of them planned for another device."""
        mac = self

        class MLComputePlan:
            def __init__(self, compute_units: Any) -> None:
                operations = [SimpleNamespace(operator_name=name) for name in ("const", "matmul", "cast")]
                block = SimpleNamespace(operations=operations)
                program = SimpleNamespace(functions={"main": SimpleNamespace(block=block)})
                self.model_structure = SimpleNamespace(program=program)
                self.fast = "MLNeuralEngineComputeDevice" if "NE" in compute_units.name else "MLGPUComputeDevice"

            def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
                if operation.operator_name == "const":
                    return None
                name = self.fast if operation.operator_name == "matmul" else "MLCPUComputeDevice"
                return SimpleNamespace(preferred_compute_device=type(name, (), {})())

            @classmethod
            def load_from_path(cls, path: str, compute_units: Any = None) -> MLComputePlan:
                assert Path(path).is_dir()
                mac.plans.append((Path(path).suffix, compute_units.name))
                return cls(compute_units)

        return MLComputePlan


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mac:
    mac = Mac()
    modules = mac.modules()
    monkeypatch.setattr("diffusion_runtime.backends.coreml.import_coremltools", lambda name="": modules[name])
    monkeypatch.setattr("diffusion_runtime.backends.coreml.platform.system", lambda: "Darwin")
    monkeypatch.setenv("COREML_SD_CACHE", str(tmp_path / "cache"))
    return mac


@pytest.mark.parametrize("name", ["load_from_path", "get_compute_device_usage_for_mlprogram_operation"])
def test_the_stand_in_has_coremltools_signatures(mac: Mac, name: str) -> None:
    real = import_coremltools("models.compute_plan").MLComputePlan
    signatures = [inspect.signature(getattr(kind, name)) for kind in (real, mac.plan_class())]
    assert len({tuple(signature.parameters) for signature in signatures}) == 1
    assert isinstance(real.model_structure, property)


def test_every_unit_is_measured_and_a_wrong_one_is_named(
    mac: Mac, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mac.wrong = "CPU_AND_NE"
    assert bench(models, "--backend", "coreml", "--runs", 1, "--report", tmp_path / "report.json") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {(row["component"], row["compute_units"]): row for row in report["measurements"]}
    assert rows.keys() == {(name, unit.value) for name in COMPONENTS for unit in ComputeUnits}
    for (name, unit), row in rows.items():
        assert (row["psnr_db"] < 30) == (unit == "cpu-and-ne"), (name, unit, row["psnr_db"])
        fast = "neural engine" if "ne" in unit else "gpu"
        assert row["devices"] == {"cpu": 1, fast: 1}
    assert report["pictures_per_minute"].keys() == {unit.value for unit in ComputeUnits} - {"cpu-and-ne"}
    last = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("wrong or failing: text_encoder on cpu-and-ne, unet on cpu-and-ne") for line in last)
    assert {suffix for suffix, _ in mac.plans} == {".mlmodelc"}


def test_a_unit_that_cannot_load_does_not_end_the_rest(mac: Mac, models: Path, tmp_path: Path) -> None:
    mac.failing = "CPU_AND_GPU"
    arguments = ("--compute-units", "cpu-and-gpu,cpu-only", "--components", "unet", "--report", tmp_path / "r.json")
    assert bench(models, "--backend", "coreml", "--runs", 1, *arguments) == 1
    first, second = json.loads((tmp_path / "r.json").read_text())["measurements"]
    assert "cannot load" in first["error"] and first["steady_seconds"] is None
    assert second["error"] is None and second["psnr_db"] > 60


def test_pictures_per_minute_counts_every_call_of_a_picture() -> None:
    seconds = {"text_encoder": 0.5, "unet": 1.0, "vae_decoder": 2.0, "safety_checker": 1.0, "vae_encoder": 9.0}
    measured = [Measurement(name, "torch", None, 0.1, 0.1, value) for name, value in seconds.items()]
    assert pictures_per_minute(measured, steps=10, calls_per_step=2) == {"torch": pytest.approx(60 / 24.0)}
    assert pictures_per_minute(measured[1:], steps=10, calls_per_step=2) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "torch", "--compute-units", "cpu-only"), "Core ML's"),
        (("--backend", "torch", "--components", "refiner"), "these models have text_encoder, unet"),
    ],
)
def test_what_cannot_be_is_said(models: Path, arguments: tuple[str, ...], message: str) -> None:
    from diffusion_runtime.errors import InputError

    with pytest.raises(InputError, match=message):
        bench(models, *arguments)
