"""Programs are checked before they run, become torch.fx modules, and show every value by its MIL name."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusion_runtime.errors import InputError, PackageError, UnsupportedError
from diffusion_runtime.mil import by_rows
from diffusion_runtime.mil.check import check_package
from diffusion_runtime.mil.fuse import WATCHABLE, fuse
from diffusion_runtime.mil.lower import Stored, lower
from diffusion_runtime.mil.observe import intermediates, observe, observe_all
from diffusion_runtime.mil.ops.registry import OPS, mil_op
from diffusion_runtime.mil.package import Package, open_package
from diffusion_runtime.mil.program import Block, DType, Operation, TensorType, Value

X = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def values(package: Package) -> dict[str, torch.Tensor]:
    """The network fixture's values, computed by torch."""
    weight = intermediates(lower(package), [X], ["weight"])["weight"]
    features = F.conv2d(X, weight)
    positive = features.relu()
    return {
        "features": features,
        "positive": positive,
        "shifted": positive + 2,
        "pooled": (positive + 2).mean((2, 3)),
    }


def with_operations(package: Package, change: Callable[[Operation], Operation]) -> Package:
    """The package with each operation of its program changed."""
    function = package.model.program.functions["main"]
    block = dataclasses.replace(
        function.block, operations=tuple(change(item) for item in function.block.operations)
    )
    changed = dataclasses.replace(function, blocks={function.opset: block})
    program = dataclasses.replace(package.model.program, functions={"main": changed})
    return dataclasses.replace(package, model=dataclasses.replace(package.model, program=program))


def test_a_program_runs_and_prints_itself(network: Path) -> None:
    package = open_package(network)
    module = lower(package)
    outputs = module(X)
    torch.testing.assert_close(outputs, {"pooled": values(package)["pooled"]})
    assert "pooled = diffusion_runtime_mil_ops_reduction_reduce_mean(" in module.code
    assert "features = None" in module.code  # freed after its last use
    assert [name for name, _ in module.named_buffers() if name == "weight"]


def test_every_value_can_be_had_by_its_mil_name(network: Path) -> None:
    package = open_package(network)
    expected = values(package)
    found = intermediates(lower(package), [X], ["positive", "features", "shifted"])
    assert list(found) == ["positive", "features", "shifted"]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    with pytest.raises(InputError, match=r"no value named postive .*near: \['positive'\]"):
        intermediates(lower(package), [X], ["postive"])


def test_every_value_is_shown_in_order_with_its_op(network: Path) -> None:
    seen: list[tuple[str, str]] = []
    package = open_package(network)
    outputs = observe(lower(package), [X], lambda name, op, _: seen.append((name, op)))
    assert seen[0] == ("x", "input")
    assert seen[1:] == [("features", "conv"), ("positive", "relu"), ("shifted", "add"), ("pooled", "reduce_mean")]
    torch.testing.assert_close(outputs["pooled"], values(package)["pooled"])


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_large_scores_are_shown_in_parts_and_never_held(
    turned: bool, reused: bool, save_program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"query": (2, 3, 4, 10), "key": (2, 3, 4, 7), "mask": (2, 1, 10, 7)}
    shapes["value"] = (2, 3, 4, 7) if turned else (2, 3, 7, 4)

    def body(mb: Any, query: Any, key: Any, mask: Any, value: Any) -> Any:
        scores = mb.matmul(x=query, y=key, transpose_x=True, name="scores")
        masked = mb.add(x=mask, y=mb.mul(x=scores, y=np.float32(0.5), name="scaled"), name="masked")
        weights = mb.softmax(x=masked, axis=-1, name="weights")
        operands = {"x": value, "y": weights, "transpose_y": True} if turned else {"x": weights, "y": value}
        mixed = mb.matmul(**operands, name="mixed")
        return (mixed, mb.relu(x=scores, name="needed")) if reused else mixed

    module = lower(open_package(save_program(body, **shapes)))
    inputs = [torch.randn(shape) for shape in shapes.values()]
    names = ["scores", "scaled", "masked", "weights", "mixed"]
    monkeypatch.setattr(by_rows, "HELD_ELEMENTS", 2 * 3 * 7 * 4)  # four rows of each head
    expected = intermediates(module, inputs, names)  # a value by its name is whole, however large
    shown: dict[str, list[torch.Tensor]] = {}
    outputs = observe(module, inputs, lambda name, _, value: shown.setdefault(name, []).append(value))
    assert [len(shown[name]) for name in names] == ([1] * 5 if reused else [3, 3, 3, 3, 1])
    torch.testing.assert_close(outputs, module(*inputs))
    for name in names:
        torch.testing.assert_close(torch.cat(shown[name], dim=-2), expected[name])


def test_streamed_weights_stay_in_the_file(save_program: Callable[..., Path]) -> None:
    big = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float16)

    def body(mb: Any, x: Any) -> Any:
        return mb.matmul(x=x, y=mb.cast(x=mb.const(val=big, name="big"), dtype="fp32", name="wide"), name="y")

    package = open_package(save_program(body, x=(2, 64)))
    x = torch.randn(2, 64)
    module = lower(package, stream_weights=True)
    assert any(isinstance(child, Stored) for child in module.children())
    assert sum(buffer.numel() for buffer in module.buffers()) == 0
    torch.testing.assert_close(module(x)["y"], x @ torch.from_numpy(big).float())
    torch.testing.assert_close(module(x), lower(package)(x))


@pytest.mark.parametrize("count", [1, 3])
def test_runs_side_by_side_show_what_each_shows_alone_and_read_each_weight_once(
    count: int, save_program: Callable[..., Path]
) -> None:
    kernel, big = (torch.randn(shape).numpy() for shape in ((64, 8, 3, 3), (64, 128)))

    def body(mb: Any, x: Any) -> Any:
        features = mb.conv(x=x, weight=mb.const(val=kernel, name="kernel"), pad_type="same", name="features")
        return mb.matmul(x=mb.reduce_mean(x=features, axes=[2, 3]), y=mb.const(val=big, name="big"), name="y")

    module = fuse(lower(open_package(save_program(body, x=(2, 8, 6, 6))), stream_weights=True), WATCHABLE)
    alone: list[tuple[str, str, torch.Tensor]] = []
    runs = [[torch.randn(2, 8, 6, 6)] for _ in range(count)]
    expected = [observe(module, run, lambda *value: alone.append(value)) for run in runs]
    read: list[torch.nn.Module] = []
    for child in module.children():
        child.register_forward_hook(lambda child, *_: read.append(child))
    shown: list[list[tuple[str, str, torch.Tensor]]] = [[] for _ in runs]
    torch.testing.assert_close(observe_all(module, runs, lambda run, *value: shown[run].append(value)), expected)
    assert len(read) == len(set(read)) == 2
    for (*names, value), (*same, found) in zip(alone, chain.from_iterable(shown), strict=True):
        assert names == same
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float16_values_take_the_type_asked_for_and_float32_ones_stay(
    dtype: torch.dtype, save_program: Callable[..., Path]
) -> None:
    def body(mb: Any, x: Any) -> Any:
        third = mb.const(val=np.float16(1 / 3), name="third")
        half = mb.cast(x=mb.mul(x=mb.cast(x=x, dtype="fp16"), y=third), dtype="fp16", name="half")
        return mb.cast(x=half, dtype="fp32", name="whole"), mb.cast(x=half, dtype="int32", name="number")

    package = open_package(save_program(body, x=(3,)))
    x = torch.tensor([1.0, -10.0, 7.0])
    module = lower(package, dtype=dtype)
    outputs = module(x)
    third = torch.tensor(np.float16(1 / 3), dtype=torch.float16).to(dtype)
    assert module.meta["input_dtypes"] == (torch.float32,)
    assert outputs["whole"].dtype == torch.float32
    torch.testing.assert_close(outputs["whole"], (x.to(dtype) * third).float(), rtol=0, atol=0)
    assert outputs["number"].tolist() == [0, -3, 2]
    assert outputs["number"].dtype == torch.int32


def test_shapes_that_the_program_computes_are_understood(save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        size = mb.slice_by_index(x=mb.shape(x=x), begin=[1], end=[3], name="size")
        mixed = mb.concat(values=(size, np.array([-1], np.int32)), axis=0)
        return mb.reshape(x=x, shape=mixed, name="y")

    package = open_package(save_program(body, x=(2, 3, 4, 5)))
    assert lower(package)(torch.zeros(2, 3, 4, 5))["y"].shape == (3, 4, 10)


def test_names_that_are_no_python_names_are_understood(network: Path) -> None:
    package = open_package(network)
    odd = {"features": "1/features.0", "positive": "lambda", "shifted": "1_features_0"}

    def rename(operation: Operation) -> Operation:
        outputs = tuple(dataclasses.replace(item, name=odd.get(item.name, item.name)) for item in operation.outputs)
        inputs = {
            key: tuple(odd.get(item, item) if isinstance(item, str) else item for item in bound)
            for key, bound in operation.inputs.items()
        }
        return dataclasses.replace(operation, outputs=outputs, inputs=inputs)

    module = lower(with_operations(package, rename))
    torch.testing.assert_close(module(X)["pooled"], values(package)["pooled"])
    torch.testing.assert_close(intermediates(module, [X], ["lambda"])["lambda"], values(package)["positive"])


def test_all_unknown_ops_are_named_at_once(network: Path) -> None:
    def replace(operation: Operation) -> Operation:
        return dataclasses.replace(
            operation, type={"relu": "twist", "add": "fold"}.get(operation.type, operation.type)
        )

    with pytest.raises(UnsupportedError, match=r"2 MIL op\(s\) not covered: fold \(1\), twist \(1\)"):
        lower(with_operations(open_package(network), replace))


def test_nested_blocks_are_looked_into(network: Path) -> None:
    inner = Block((Operation("twist", {}, ()),), ())

    def replace(operation: Operation) -> Operation:
        return dataclasses.replace(operation, blocks=(inner,)) if operation.type == "relu" else operation

    with pytest.raises(UnsupportedError, match=r"twist \(1\)"):
        check_package(with_operations(open_package(network), replace))


def parameter(name: str, binding: str | Value | None) -> Callable[[Operation], Operation]:
    def change(operation: Operation) -> Operation:
        if operation.type != "conv":
            return operation
        kept = {key: value for key, value in operation.inputs.items() if key != name}
        return dataclasses.replace(operation, inputs=kept if binding is None else {**kept, name: (binding,)})

    return change


FAULTS: dict[str, tuple[Callable[[Operation], Operation], type[Exception], str]] = {
    "unknown value": (
        parameter("pad_type", Value(TensorType(DType.STRING), "mirror")),
        UnsupportedError,
        "conv features: pad_type 'mirror' is unknown; known: valid, custom, same, same_lower",
    ),
    "unknown parameter": (
        parameter("fluff", Value(TensorType(DType.INT32), np.array(1, np.int32))),
        UnsupportedError,
        "conv features: parameter fluff is unknown",
    ),
    "missing parameter": (
        parameter("weight", None),
        UnsupportedError,
        "conv features: parameter weight is missing",
    ),
    "undefined operand": (
        parameter("x", "nothing"),
        PackageError,
        "conv features: x is 'nothing', which nothing before it defines",
    ),
    "later operand": (parameter("x", "shifted"), PackageError, "x is 'shifted', which nothing before it defines"),
    "computed constant": (parameter("groups", "x"), UnsupportedError, "groups is computed by the program"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_found_before_the_run(kind: str, network: Path) -> None:
    change, error, message = FAULTS[kind]
    with pytest.raises(error, match=message) as caught:
        lower(with_operations(open_package(network), change))
    assert str(network) in str(caught.value)


def test_damaged_weights_are_found_before_the_run(network: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(network, tmp_path / "cut.mlpackage"))
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(PackageError, match=r"damaged: const weight: .*weight.bin: blob at offset 64: .*truncated"):
        lower(open_package(path))
    weights.unlink()
    with pytest.raises(PackageError, match="weight file cannot be read"):
        lower(open_package(path))


def test_an_op_that_fails_is_named(network: Path) -> None:
    module = lower(
        with_operations(
            open_package(network), parameter("groups", Value(TensorType(DType.INT32), np.array(3, np.int32)))
        )
    )
    with pytest.raises(PackageError, match="conv features: operands do not fit"):
        observe_all(module, [[X]])


def test_a_value_that_is_not_as_declared_is_named(network: Path) -> None:
    def widen(operation: Operation) -> Operation:
        outputs = tuple(
            dataclasses.replace(item, type=TensorType(DType.FLOAT32, (1, 9))) for item in operation.outputs
        )
        return dataclasses.replace(operation, outputs=outputs) if operation.type == "relu" else operation

    with pytest.raises(PackageError, match=r"relu positive: gives .* of shape \(1, 8, 4, 4\), but .* \(1, 9\)"):
        observe_all(lower(with_operations(open_package(network), widen)), [[X]])


def test_an_op_cannot_be_defined_twice() -> None:
    def again(x: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(ValueError, match="'relu' is defined twice"):
        mil_op("relu")(again)
    assert OPS["relu"].function is not again
