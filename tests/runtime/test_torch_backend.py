"""The torch backend: any package as a model of numpy arrays."""

from __future__ import annotations

import gc
import linecache
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_runtime.backends import load_backend
from diffusion_runtime.backends.torch_mil import TorchBackend, TorchModel
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.models import Models
from shared_data import PAIRS, needs_pairs

pytestmark = pytest.mark.usefixtures("loaded_anew")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(12, 16)
        self.norm = torch.nn.GroupNorm(4, 16)
        self.conv = torch.nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        states = self.embed(ids).transpose(1, 2) + x
        return torch.nn.functional.silu(self.conv(self.norm(states)))


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Block]:
    """A float16 package with an integer and a float16 input, and its network."""
    torch.manual_seed(0)
    network = Block().eval()
    example = (torch.zeros(2, 7, dtype=torch.int32), torch.zeros(2, 16, 7))
    ct = import_coremltools()
    traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
    inputs = [ct.TensorType("ids", (2, 7), dtype=np.int32), ct.TensorType("x", (2, 16, 7), dtype=np.float16)]
    options = {"minimum_deployment_target": ct.target.iOS16, "skip_model_load": True}
    outputs = [ct.TensorType("y", dtype=np.float32)]
    model = ct.convert(traced, inputs=inputs, outputs=outputs, convert_to="mlprogram", **options)
    path = tmp_path_factory.mktemp("block") / "block.mlpackage"
    model.save(str(path))
    return path, network


@pytest.fixture(scope="module")
def toy_timestep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sine of 0.9 times a timestep, taken in float32 between float16 values, as a UNet's embedding does."""
    ct, builder = import_coremltools(), import_coremltools("converters.mil").Builder
    types = import_coremltools("converters.mil.mil.types")

    @builder.program(  # type: ignore[untyped-decorator]
        input_specs=[builder.TensorSpec((2,), dtype=types.fp16)], opset_version=ct.target.iOS16
    )
    def program(timestep: Any) -> Any:
        phase = builder.mul(x=builder.cast(x=timestep, dtype="fp32"), y=np.float32(0.9))
        return builder.cast(x=builder.sin(x=phase), dtype="fp16", name="phase")

    path = tmp_path_factory.mktemp("timestep") / "timestep.mlpackage"
    options = {"compute_precision": ct.precision.FLOAT32, "skip_model_load": True}
    ct.convert(program, minimum_deployment_target=ct.target.iOS16, **options).save(str(path))
    return path


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    ids = random.integers(0, 12, (2, 7)).astype(np.int32)
    return {"ids": ids, "x": random.standard_normal((2, 16, 7)).astype(np.float16)}


def expected(network: Block) -> np.ndarray:
    given = arrays()
    with torch.no_grad():
        result: np.ndarray = network(torch.from_numpy(given["ids"]), torch.from_numpy(given["x"]).float()).numpy()
    return result


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("stream_weights", [True, False])
def test_a_package_computes_what_its_network_computes(
    fuse: bool, stream_weights: bool, block: tuple[Path, Block]
) -> None:
    path, network = block
    model = TorchBackend(fuse=fuse, stream_weights=stream_weights).load(path)
    outputs = model(**arrays())
    assert outputs["y"].dtype == np.float32
    np.testing.assert_allclose(outputs["y"], expected(network), atol=3e-3)
    np.testing.assert_array_equal(model(**arrays())["y"], outputs["y"])


def test_inputs_and_outputs_are_those_of_the_description(block: tuple[Path, Block]) -> None:
    model = TorchBackend().load(block[0])
    assert {spec.name: (spec.shape, spec.dtype) for spec in model.inputs.values()} == {
        "ids": ((2, 7), "int32"),
        "x": ((2, 16, 7), "float16"),
    }
    assert {spec.name: (spec.shape, spec.dtype) for spec in model.outputs.values()} == {"y": ((2, 8, 7), "float32")}


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.1), ("float16", 2e-2)])
def test_other_float_types_compute_nearly_the_same(dtype: str, bound: float, block: tuple[Path, Block]) -> None:
    path, network = block
    outputs = TorchBackend(dtype=dtype).load(path)(**arrays())
    assert outputs["y"].dtype == np.float32
    np.testing.assert_allclose(outputs["y"], expected(network), atol=bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_timestep_keeps_its_phase_in_every_type(dtype: str, toy_timestep: Path) -> None:
    timesteps = np.array([981, 999], np.float16)
    outputs = TorchBackend(dtype=dtype).load(toy_timestep)(timestep=timesteps)
    np.testing.assert_allclose(outputs["phase"], np.sin(timesteps.astype(np.float32) * 0.9), atol=1e-2)


def test_the_model_leaves_its_inputs_alone_and_takes_any_layout(block: tuple[Path, Block]) -> None:
    model: TorchModel = TorchBackend().load(block[0])
    given = arrays()
    before = {name: array.copy() for name, array in given.items()}
    outputs = model(**given)
    for name, array in given.items():
        np.testing.assert_array_equal(array, before[name])
    given["x"] = np.asfortranarray(given["x"]).astype(np.float64)
    given["x"].flags.writeable = False
    np.testing.assert_array_equal(model(**given)["y"], outputs["y"])


def test_wrong_arrays_are_listed(block: tuple[Path, Block]) -> None:
    model = TorchBackend().load(block[0])
    with pytest.raises(InputError, match=r"missing ids; unknown z; x has shape \(1,\), expected \(2, 16, 7\)"):
        model(x=np.zeros(1), z=np.zeros(1))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (TorchBackend(dtype="float8"), "unknown dtype 'float8': expected one of float32, bfloat16, float16"),
        (TorchBackend(device="warp:9"), "device 'warp:9' cannot be used"),
    ],
)
def test_unknown_dtypes_and_devices_are_refused(
    backend: TorchBackend, message: str, block: tuple[Path, Block]
) -> None:
    with pytest.raises(InputError, match=message):
        backend.load(block[0])


def test_indices_out_of_range_name_the_op(block: tuple[Path, Block]) -> None:
    path, _ = block
    model = TorchBackend().load(path)
    given = {**arrays(), "ids": np.full((2, 7), 12, np.int32)}
    with pytest.raises(PackageError, match=rf"{path}: gather \S+: operands do not fit") as caught:
        model(**given)
    assert "\n" not in str(caught.value)


def test_the_backend_is_found_by_name() -> None:
    assert isinstance(load_backend("torch"), TorchBackend)


def test_importing_the_backend_does_not_import_coremltools() -> None:
    code = "import sys, diffusion_runtime.backends.torch_mil; print('coremltools' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"


@needs_pairs
@pytest.mark.parametrize("pair", PAIRS, ids=lambda path: path.name)
def test_samples_compute_the_same_packed_compiled_streamed_and_fused(pair: Path) -> None:
    (package,), (compiled,) = pair.glob("*.mlpackage"), pair.glob("*.mlmodelc")
    backends = (TorchBackend(), TorchBackend(fuse=False), TorchBackend(stream_weights=True, fuse=False))
    models = [*(backend.load(package) for backend in backends), TorchBackend(fuse=False).load(compiled)]
    random = np.random.default_rng(0)
    inputs = models[0].inputs.values()
    given = {spec.name: (random.standard_normal(spec.shape) * 0.1).astype(spec.dtype) for spec in inputs}
    fused, plain, *others = (model(**given) for model in models)
    for name, value in plain.items():
        assert np.isfinite(value).all()
        assert value.std() > 0 or value.size == 1
        np.testing.assert_allclose(fused[name], value, atol=1e-5)
        for other in others:
            np.testing.assert_array_equal(other[name], value)


def test_a_model_that_is_released_leaves_nothing_behind(block: tuple[Path, Block]) -> None:
    """Neither its weights until the collector happens to run, nor the text of its generated code for good."""

    def texts() -> int:
        return sum("eval_with_key" in name for name in linecache.cache)

    models = Models({"unet": lambda: TorchBackend().load(block[0])}, keep=False)
    gc.collect()
    before = texts()
    gc.disable()  # its own time must not matter
    try:
        for _ in range(5):
            model = models["unet"].model
            assert isinstance(model, TorchModel) and model.module.code and texts() > before
            module = weakref.ref(model.module)
            del model
            models.release("unet")
            assert module() is None and texts() == before
    finally:
        gc.enable()
