"""Each MIL op against coremltools' own evaluation of it on constants (numpy, written by MIL's authors)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.mil.ops.registry import OPS, Kind, Op

RANDOM = np.random.default_rng(0)
A = RANDOM.standard_normal((2, 3, 4, 5)).astype(np.float32)
B = RANDOM.standard_normal((2, 3, 4, 5)).astype(np.float32)
POSITIVE = RANDOM.uniform(0.1, 3, (2, 6)).astype(np.float32)
INTS = np.array([[7, -7, 5], [0, 3, -1]], np.int32)
DIVISORS = np.array([[2, 2, -3], [4, -2, 5]], np.int32)
BOOLS = np.array([[True, False], [False, False]])
OTHERS = np.array([[True, True], [False, True]])
PLACES = np.array([2, 0, -1], np.int32)

Row = tuple[str, dict[str, Any]]

UNARY: list[Row] = [
    *((op, {"x": A}) for op in ("abs", "cos", "erf", "exp", "floor", "identity")),
    *((op, {"x": A}) for op in ("relu", "sigmoid", "sin", "square")),
    *((op, {"x": A}) for op in ("tanh", "softmax")),
    *((op, {"x": POSITIVE}) for op in ("sqrt", "rsqrt", "inverse")),
    ("abs", {"x": INTS}),
    ("square", {"x": INTS}),
    ("rsqrt", {"x": POSITIVE, "epsilon": np.float32(0.1)}),
    ("inverse", {"x": POSITIVE, "epsilon": np.float32(0.1)}),
    ("clip", {"x": A, "alpha": np.float32(-0.5), "beta": np.float32(0.3)}),
    ("softmax", {"x": A, "axis": 1}),
    ("gelu", {"x": A}),
    ("gelu", {"x": A, "mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": A, "mode": "SIGMOID_APPROXIMATION"}),
    *(
        ("cast", {"x": np.array([-1.7, 0.0, 2.9], np.float32), "dtype": dtype})
        for dtype in ("int32", "bool", "fp32")
    ),
    ("cast", {"x": INTS, "dtype": "fp32"}),
    ("cast", {"x": BOOLS, "dtype": "int32"}),
]
BINARY: list[Row] = [
    *((op, {"x": A, "y": B}) for op in ("add", "sub", "mul", "real_div", "maximum", "minimum", "equal", "less")),
    *((op, {"x": A, "y": B}) for op in ("greater", "greater_equal", "less_equal", "not_equal", "floor_div")),
    *((op, {"x": A, "y": np.float32(0.5)}) for op in ("add", "mul")),
    ("mul", {"x": A, "y": B[:1, :, :1]}),
    ("pow", {"x": POSITIVE, "y": np.float32(1.5)}),
    *((op, {"x": INTS, "y": DIVISORS}) for op in ("floor_div", "add", "mul", "equal", "maximum")),
    *((op, {"x": BOOLS, "y": OTHERS}) for op in ("logical_and", "logical_or")),
    ("select", {"cond": A > 0, "a": A, "b": B}),
    ("matmul", {"x": A, "y": B, "transpose_y": True}),
    ("matmul", {"x": A, "y": B, "transpose_x": True}),
    ("matmul", {"x": A, "y": B.swapaxes(2, 3).copy()}),
    ("linear", {"x": A[0, 0], "weight": B[0, 0], "bias": np.array([1, 2, 3, 4], np.float32)}),
    ("linear", {"x": A[0, 0], "weight": B[0, 0]}),
    ("einsum", {"values": [A, B.transpose(0, 3, 2, 1).copy()], "equation": "bnhc,bchk->bnhk"}),
    ("scaled_dot_product_attention", {"query": A, "key": B, "value": B}),
    ("scaled_dot_product_attention", {"query": A, "key": B, "value": B, "attn_mask": B[0, 0, :, :4]}),
]
REDUCTIONS: list[Row] = [
    (f"reduce_{name}", {"x": POSITIVE.reshape(2, 3, 2), **options})
    for name in ("l2_norm", "max", "mean", "sum")
    for options in ({}, {"axes": [1]}, {"axes": [0, -1], "keep_dims": True})
] + [
    ("reduce_argmax", {"x": A, "axis": 1}),
    ("reduce_sum", {"x": INTS, "axes": [1]}),
    ("reduce_max", {"x": INTS}),
]
SHAPES: list[Row] = [
    ("reshape", {"x": A, "shape": [6, -1]}),
    ("reshape", {"x": A, "shape": [0, 12, 1, 0]}),
    ("transpose", {"x": A, "perm": [3, 0, -2, 1]}),
    ("expand_dims", {"x": A, "axes": [0, -1, 3]}),
    ("squeeze", {"x": A[:1, :, :, :1], "axes": [0, 3]}),
    ("squeeze", {"x": A[:1, :, :, :1]}),
    ("concat", {"values": [A, B], "axis": -2}),
    ("stack", {"values": [A, B], "axis": 1}),
    ("split", {"x": A, "axis": 3, "split_sizes": [1, 3, 1]}),
    ("split", {"x": A, "axis": -2, "num_splits": 2}),
    ("tile", {"x": A, "reps": [1, 2, 1, 3]}),
    ("shape", {"x": A}),
    ("slice_by_index", {"x": A, "begin": [0, 1, -3, 0], "end": [2, 3, -1, 5], "stride": [1, 1, 1, 2]}),
    (
        "slice_by_index",
        {
            "x": A,
            "begin": [1, 2, 3, 4],
            "end": [0, 0, 0, 0],
            "stride": [1, -1, -2, -3],
            "begin_mask": [True, False, True, False],
            "end_mask": [True, False, True, True],
        },
    ),
    (
        "slice_by_index",
        {"x": A, "begin": [0, -1, 0, 2], "end": [1, 0, 4, 5], "squeeze_mask": [True, True, False, False]},
    ),
    ("slice_by_size", {"x": A, "begin": [0, 1, -3, 0], "size": [2, 1, 2, -1]}),
    ("pad", {"x": A, "pad": [1, 2, 0, 3], "constant_val": np.float32(0.5)}),
    ("pad", {"x": A, "pad": [0, 0, 1, 2, 2, 1, 0, 3], "mode": "reflect"}),
    ("pad", {"x": A, "pad": [1, 2, 2, 1], "mode": "replicate"}),
]
INDEXING: list[Row] = [
    ("gather", {"x": A, "indices": PLACES, "axis": 1}),
    ("gather", {"x": A, "indices": np.array([[0, 1], [1, -1]], np.int32), "axis": -2}),
    ("gather", {"x": A, "indices": np.int32(1), "axis": 2}),
    ("gather", {"x": A, "indices": np.array([[0, 2, 1], [1, 1, 0]], np.int32), "axis": 2, "batch_dims": 1}),
    ("gather", {"x": INTS, "indices": PLACES, "axis": 1}),
    ("band_part", {"x": A, "lower": 1, "upper": 0}),
    ("band_part", {"x": A, "lower": -1, "upper": 1}),
    ("band_part", {"x": A}),
    ("fill", {"shape": [2, 3], "value": np.float32(1.5)}),
    ("fill", {"shape": [2, 3], "value": np.int32(4)}),
    ("layer_norm", {"x": A, "axes": [-1], "gamma": A[0, 0, 0], "beta": B[0, 0, 0]}),
    (
        "layer_norm",
        {"x": A, "axes": [1], "gamma": A[0, :, 0, 0], "beta": B[0, :, 0, 0], "epsilon": np.float32(0.1)},
    ),
    ("layer_norm", {"x": A, "axes": [3, 1], "gamma": A[0, :, 0], "beta": B[0, :, 0]}),
]
ROWS = UNARY + BINARY + REDUCTIONS + SHAPES + INDEXING


def reference(op: str, inputs: dict[str, Any]) -> list[np.ndarray]:
    """What coremltools computes while it builds a program of this one op."""
    mil = import_coremltools("converters.mil")
    target = import_coremltools().target.iOS18
    with mil.mil.Function({}, opset_version=target):
        result = getattr(mil.Builder, op)(**copy.deepcopy(inputs))
    return [np.asarray(item.val) for item in (result if isinstance(result, (list, tuple)) else [result])]


def computed(op: Op, inputs: dict[str, Any], dtype: np.dtype[Any]) -> list[np.ndarray]:
    """What our function computes of the same operands."""
    arguments: dict[str, Any] = {}
    for name, value in inputs.items():
        kind = op.parameters[name].kind
        if kind is Kind.TENSORS:
            arguments[name] = [torch.from_numpy(item) for item in value]
        elif kind is Kind.TENSOR:
            arguments[name] = torch.from_numpy(np.array(value, order="C"))
        else:
            arguments[name] = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if "out_dtype" in op.parameters:
        arguments["out_dtype"] = torch.from_numpy(np.empty(0, dtype)).dtype
    result = op.function(**arguments)
    return [item.numpy() for item in (result if op.several else (result,))]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("op", "inputs"), ROWS, ids=[f"{index}-{op}" for index, (op, _) in enumerate(ROWS)])
def test_op_computes_what_coremltools_computes(op: str, inputs: dict[str, Any]) -> None:
    expected = reference(op, inputs)
    results = computed(OPS[op], inputs, expected[0].dtype)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        assert result.dtype.kind == wanted.dtype.kind
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-6)
