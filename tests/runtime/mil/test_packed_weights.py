"""Compressed weights: bit for bit what coremltools itself decompresses, alone and in whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import PackageError, UnsupportedError
from diffusion_runtime.mil.ops.packed import constexpr_lut_to_dense, constexpr_sparse_to_dense
from diffusion_runtime.mil.ops.registry import OPS
from diffusion_runtime.mil.packing import pack

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 255, (4, 6)).astype(np.uint8)
SIGNED = RANDOM.integers(-128, 127, (4, 6)).astype(np.int8)
HALVES = RANDOM.standard_normal((4, 6)).astype(np.float16)
MASK = (RANDOM.uniform(size=(4, 6)) < 0.5).astype(np.uint8)
KEPT = int(MASK.sum())
INDICES = RANDOM.integers(0, 4, (4, 6)).astype(np.uint8)


def halves(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float16)


IOS16 = [
    *(
        ("constexpr_affine_dequantize", (BYTES, np.uint8(7), np.float16(0.013), np.int32(0))),
        ("constexpr_affine_dequantize", (SIGNED, SIGNED[:, 0].copy(), halves(4), np.int32(0))),
        ("constexpr_affine_dequantize", (SIGNED, np.float32(1.5), halves(6).astype(np.float32), np.int32(-1))),
    ),
    *(
        (
            "constexpr_lut_to_dense",
            (
                halves(1 << bits),
                pack(RANDOM.integers(0, 1 << bits, 35).astype(np.uint8), bits),
                np.array([5, 7], np.uint32),
            ),
        )
        for bits in (1, 2, 4, 6, 8)
    ),
    ("constexpr_sparse_to_dense", (HALVES[MASK != 0], pack(MASK, 1), np.array([4, 6], np.uint32))),
]
IOS18 = [
    *(("constexpr_blockwise_shift_scale", (data, scale, offset))
      for data, scale, offset in (
          (SIGNED, halves(4, 1), None), (SIGNED, halves(2, 3), SIGNED[:2, :3].copy()),
          (BYTES, halves(1, 2), halves(1, 2)),
          (SIGNED, halves(4, 1).astype(np.float32), SIGNED[:, :1].copy()))),
    ("constexpr_lut_to_dense", (INDICES, halves(1, 1, 4, 1), None)),
    ("constexpr_lut_to_dense", (INDICES, halves(2, 3, 4, 1), None)),
    ("constexpr_lut_to_dense", (INDICES, halves(1, 1, 4, 3), 0)),
    ("constexpr_lut_to_dense", (INDICES, halves(2, 1, 4, 3), 1)),
    ("constexpr_lut_to_dense", (INDICES, halves(2, 1, 4, 2), -1)),
    ("constexpr_sparse_to_dense", (HALVES[MASK != 0], MASK)),
    ("constexpr_lut_to_sparse", (MASK, INDICES[MASK != 0], halves(2, 1, 4, 1), None)),
    ("constexpr_lut_to_sparse", (MASK, INDICES[MASK != 0], halves(1, 1, 4, 2), 1)),
    ("constexpr_sparse_blockwise_shift_scale", (MASK, SIGNED[MASK != 0], halves(4, 1), SIGNED[:, :1].copy())),
]  # fmt: skip
OURS = {  # the order in which coremltools' functions take their operands
    ("constexpr_affine_dequantize", 16): ("quantized_data", "zero_point", "scale", "axis"),
    ("constexpr_lut_to_dense", 16): ("lut", "indices", "shape"),
    ("constexpr_sparse_to_dense", 16): ("nonzero_data", "mask", "shape"),
    ("constexpr_blockwise_shift_scale", 18): ("data", "scale", "offset"),
    ("constexpr_lut_to_dense", 18): ("indices", "lut", "vector_axis"),
    ("constexpr_sparse_to_dense", 18): ("nonzero_data", "mask"),
    ("constexpr_lut_to_sparse", 18): ("indices_mask", "indices_nonzero_data", "lut", "vector_axis"),
    ("constexpr_sparse_blockwise_shift_scale", 18): ("data_mask", "nonzero_data", "scale", "offset"),
}
ROWS = [(16, *row) for row in IOS16] + [(18, *row) for row in IOS18]


@pytest.mark.parametrize(("release", "op", "operands"), ROWS, ids=[f"iOS{r}-{op}" for r, op, _ in ROWS])
def test_each_form_equals_coremltools_bit_for_bit(release: int, op: str, operands: tuple[Any, ...]) -> None:
    module = "constexpr_ops" if release == 16 else "compression"
    theirs = import_coremltools(f"converters.mil.mil.ops.defs.iOS{release}.{module}")
    expected = getattr(theirs, op).decompress(*operands)
    named = dict(zip(OURS[op, release], operands, strict=True))
    constants = {name for name in ("axis", "vector_axis", "shape") if named.get(name) is not None}
    named |= {name: np.asarray(named[name]).tolist() for name in constants}
    found = OPS[op].function(**named)
    for result, wanted in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        assert result.dtype == wanted.dtype
        assert result.tobytes() == wanted.tobytes()
        assert result.shape == wanted.shape


def test_damaged_forms_are_refused() -> None:
    with pytest.raises(PackageError, match="3 bytes of indices, expected 9"):
        constexpr_lut_to_dense(np.zeros(3, np.uint8), halves(4), shape=[35])
    with pytest.raises(UnsupportedError, match="a table of 5 entries"):
        constexpr_lut_to_dense(np.zeros(3, np.uint8), halves(5), shape=[3])
    with pytest.raises(PackageError, match="2 values for a mask of 3"):
        constexpr_sparse_to_dense(halves(2), np.array([1, 1, 1], np.uint8))


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 32, 3, padding=1)
        self.linear = torch.nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.conv(x).relu().mean((2, 3)))
        return result


@pytest.fixture(scope="module")
def mlmodel(request: pytest.FixtureRequest) -> Any:
    """coremltools' own model of a small network, for iOS 16 or 18."""
    torch.manual_seed(0)
    ct = import_coremltools()
    x = torch.randn(1, 8, 6, 6)
    traced = torch.jit.trace(Small().eval(), x, check_trace=False)  # type: ignore[no-untyped-call]
    target = getattr(ct.target, f"iOS{request.param}")
    options = {"convert_to": "mlprogram", "minimum_deployment_target": target, "skip_model_load": True}
    return ct.convert(traced, inputs=[ct.TensorType("x", x.shape)], **options)


RECIPES: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "palettized 4 bits": (16, [("Palettizer", {"nbits": 4, "mode": "uniform"})]),
    "palettized 6 bits": (16, [("Palettizer", {"nbits": 6, "mode": "uniform"})]),
    "linear symmetric": (16, [("LinearQuantizer", {"mode": "linear_symmetric"})]),
    "linear": (16, [("LinearQuantizer", {"mode": "linear"})]),
    "pruned": (16, [("MagnitudePruner", {"target_sparsity": 0.6})]),
    "grouped channels": (
        18,
        [("Palettizer", {"nbits": 3, "mode": "uniform", "granularity": "per_grouped_channel", "group_size": 8})],
    ),
    "linear int4 in blocks": (
        18,
        [("LinearQuantizer", {"dtype": "int4", "granularity": "per_block", "block_size": 8})],
    ),
    "pruned and palettized": (
        18,
        [("MagnitudePruner", {"target_sparsity": 0.6}), ("Palettizer", {"nbits": 2, "mode": "uniform"})],
    ),
    "pruned and quantized": (
        18,
        [("MagnitudePruner", {"target_sparsity": 0.6}), ("LinearQuantizer", {"dtype": "int8"})],
    ),
    "palettized and quantized": (
        18,
        [
            ("Palettizer", {"nbits": 4, "mode": "uniform"}),
            ("LinearQuantizer", {"dtype": "int8", "granularity": "per_tensor"}),
        ],
    ),
}
FUNCTIONS = {
    "Palettizer": ("palettize_weights", "OpPalettizerConfig"),
    "LinearQuantizer": ("linear_quantize_weights", "OpLinearQuantizerConfig"),
    "MagnitudePruner": ("prune_weights", "OpMagnitudePrunerConfig"),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    ("mlmodel", "recipe"),
    [(release, recipe) for release in (16, 18) for recipe in RECIPES if release >= RECIPES[recipe][0]],
    indirect=["mlmodel"],
)
@pytest.mark.parametrize("stream_weights", [False, True])
def test_models_that_coremltools_compresses_compute_what_it_decompresses(
    recipe: str, stream_weights: bool, mlmodel: Any, tmp_path: Path
) -> None:
    model = mlmodel
    optimize = import_coremltools("optimize.coreml")
    for position, (kind, options) in enumerate(RECIPES[recipe][1]):
        function, config = FUNCTIONS[kind]
        setting = getattr(optimize, config)(weight_threshold=0, **options)
        joint = {"joint_compression": True} if position else {}
        model = getattr(optimize, function)(model, optimize.OptimizationConfig(global_config=setting), **joint)
    model.save(str(tmp_path / "packed.mlpackage"))
    optimize.decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
    x = np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype(np.float32)
    results = []
    for name in ("packed", "dense"):
        loaded = TorchBackend(stream_weights=stream_weights).load(tmp_path / f"{name}.mlpackage")
        results.append(next(iter(loaded(x=x.astype(loaded.inputs["x"].dtype)).values())))
    types = {operation.type for operation in _operations(tmp_path / "packed.mlpackage")}
    assert any(name.startswith("constexpr_") for name in types)
    np.testing.assert_array_equal(results[0], results[1])


def _operations(path: Path) -> Any:
    from diffusion_runtime.mil.package import open_package

    return open_package(path).model.program.functions["main"].block.operations
