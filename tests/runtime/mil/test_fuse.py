"""Fusing: each pattern becomes one node, and no result changes by more than 80 dB; what is no pattern stays."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from diffusion_runtime.mil.fuse import WATCHABLE, fuse
from diffusion_runtime.mil.lower import lower
from diffusion_runtime.mil.memory_format import X86
from diffusion_runtime.mil.observe import FAR, SCORES, observe
from diffusion_runtime.mil.package import open_package

Body = Callable[..., Any]
MIN_PSNR_DB = 80.0
RANDOM = np.random.default_rng(0)
GAMMA, BETA = (RANDOM.standard_normal((1, 8, 1, 1)).astype(np.float32) for _ in range(2))


def psnr_db(expected: torch.Tensor, found: torch.Tensor) -> float:
    error = float((expected - found).double().square().mean())
    return math.inf if error == 0 else 10 * math.log10(float(expected.abs().max()) ** 2 / error)


def fused_ops(path: Path, *shapes: tuple[int, ...]) -> Counter[str]:
    """The ops of a package after fusing. It must compute what it computed before, also the second time, and leave
    its inputs as they are."""
    package = open_package(path)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    kept = [tensor.clone() for tensor in inputs]
    plain = lower(package)
    module = fuse(lower(package))
    with torch.inference_mode():
        expected, first, second = plain(*inputs), module(*inputs), module(*inputs)
    for name, value in expected.items():
        assert value.std() > 0
        assert first[name].shape == value.shape
        assert psnr_db(value, first[name]) >= MIN_PSNR_DB
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)
    torch.testing.assert_close(inputs, kept, rtol=0, atol=0)
    return ops(module)


def ops(module: fx.GraphModule) -> Counter[str]:
    return Counter(
        node.meta["op"] for node in module.graph.nodes if node.op == "call_function" and "mil" in node.meta
    )


# --- norms


def normalized(mb: Any, x: Any, axes: list[int], reciprocal: bool = False) -> Any:
    centred = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=axes, keep_dims=True))
    square = mb.mul(x=centred, y=centred) if reciprocal else mb.square(x=centred)
    variance = mb.add(x=mb.reduce_mean(x=square, axes=axes, keep_dims=True), y=np.float32(1e-3))
    if reciprocal:
        return mb.mul(x=mb.rsqrt(x=variance), y=centred)
    return mb.real_div(x=centred, y=mb.sqrt(x=variance))


@pytest.mark.parametrize("affine", ["none", "mul and add", "batch norm", "only mul"])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_group_norm(affine: str, reciprocal: bool, save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        groups = normalized(mb, mb.reshape(x=x, shape=[2, 4, 2, 5, 3]), [2, 3, 4], reciprocal)
        y = mb.reshape(x=groups, shape=[2, 8, 5, 3])
        if affine == "batch norm":
            scale, shift = GAMMA.reshape(8), BETA.reshape(8)
            return mb.batch_norm(
                x=y, mean=shift, variance=scale**2, gamma=scale, beta=shift, epsilon=np.float32(1e-5)
            )
        y = y if affine == "none" else mb.mul(x=y, y=GAMMA)
        return mb.add(x=y, y=BETA) if affine == "mul and add" else y

    found = fused_ops(save_program(body, x=(2, 8, 5, 3)), (2, 8, 5, 3))
    assert found == Counter(["group_norm", "mul"] if affine == "only mul" else ["group_norm"])


@pytest.mark.parametrize("axes", [[1], [-1], [2, 3]])
def test_layer_norm(axes: list[int], save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: normalized(mb, x, axes), x=(2, 8, 5, 3))
    assert fused_ops(path, (2, 8, 5, 3)) == Counter(["layer_norm"])


def test_a_norm_whose_parts_are_outputs_keeps_them(save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        mean = mb.reduce_mean(x=x, axes=[1], keep_dims=True, name="mean")
        centred = mb.sub(x=x, y=mean, name="centred")
        variance = mb.add(x=mb.reduce_mean(x=mb.square(x=centred), axes=[1], keep_dims=True), y=np.float32(1e-3))
        return mb.real_div(x=centred, y=mb.sqrt(x=variance), name="normal"), mean, centred

    assert fused_ops(save_program(body, x=(2, 8, 5)), (2, 8, 5)) == Counter(["layer_norm", "reduce_mean", "sub"])


@pytest.mark.parametrize("fault", ["other axes", "other mean", "plus a tensor", "variance kept flat"])
def test_what_is_nearly_a_norm_stays(fault: str, save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        mean = mb.reduce_mean(x=mb.square(x=x) if fault == "other mean" else x, axes=[1], keep_dims=True)
        centred = mb.sub(x=x, y=mean)
        axes = [2] if fault == "other axes" else [1]
        variance = mb.reduce_mean(x=mb.square(x=centred), axes=axes, keep_dims=fault != "variance kept flat")
        offset = mb.square(x=mean) if fault == "plus a tensor" else np.float32(1e-3)
        return mb.real_div(x=centred, y=mb.sqrt(x=mb.add(x=variance, y=offset)))

    assert fused_ops(save_program(body, x=(5, 5, 5)), (5, 5, 5))["layer_norm"] == 0


# --- activations


@pytest.mark.parametrize("first", [True, False])
def test_silu(first: bool, save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        gate = mb.sigmoid(x=x)
        return mb.mul(x=gate, y=x) if first else mb.mul(x=x, y=gate)

    assert fused_ops(save_program(body, x=(3, 4)), (3, 4)) == Counter(["silu"])


def test_another_sigmoid_is_no_silu(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x, z: mb.mul(x=mb.sigmoid(x=x), y=z), x=(3, 4), z=(3, 4))
    assert fused_ops(path, (3, 4), (3, 4)) == Counter(["sigmoid", "mul"])


# --- attention: each body takes query, key, value and gives the mixed values


def by_matmul(mb: Any, q: Any, k: Any, v: Any) -> Any:
    """Heads as a dimension: (batch, heads, length, width)."""
    scores = mb.matmul(x=mb.mul(x=q, y=np.float32(0.3)), y=k, transpose_y=True)
    return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)


def by_matmul_scaled_after(mb: Any, q: Any, k: Any, v: Any) -> Any:
    scores = mb.real_div(x=mb.matmul(x=q, y=k, transpose_y=True), y=np.float32(3))
    return mb.matmul(x=mb.softmax(x=scores, axis=3), y=v)


def by_matmul_on_columns(mb: Any, q: Any, k: Any, v: Any) -> Any:
    """(batch, heads, width, length), as our own converter wrote it in 0.1."""
    q, k, v = (mb.transpose(x=t, perm=[0, 1, 3, 2]) for t in (q, k, v))
    scores = mb.matmul(x=q, y=mb.mul(x=k, y=np.float32(0.3)), transpose_x=True)
    mixed = mb.matmul(x=v, y=mb.softmax(x=scores, axis=3), transpose_y=True)
    return mb.transpose(x=mixed, perm=[0, 1, 3, 2])


def by_matmul_weights_first(mb: Any, q: Any, k: Any, v: Any) -> Any:
    """As our own converter writes it: everything is (batch, heads, width, length) but the scores."""
    q, k, v = (mb.transpose(x=t, perm=[0, 1, 3, 2]) for t in (q, k, v))
    scores = mb.matmul(x=mb.mul(x=q, y=np.float32(0.3)), y=k, transpose_x=True)
    return mb.matmul(x=mb.softmax(x=scores, axis=3), y=v, transpose_y=True)


def by_matmul_keys_first(mb: Any, q: Any, k: Any, v: Any) -> Any:
    scores = mb.matmul(x=k, y=q, transpose_y=True)
    return mb.matmul(x=mb.softmax(x=scores, axis=2), y=v, transpose_x=True)


def by_batched_matmul(mb: Any, q: Any, k: Any, v: Any) -> Any:
    """Heads in the batch: rank 3."""
    q, k, v = (mb.reshape(x=t, shape=[-1, *t.shape[2:]]) for t in (q, k, v))
    scores = mb.softmax(x=mb.matmul(x=q, y=k, transpose_y=True), axis=-1)
    return mb.reshape(x=mb.matmul(x=scores, y=v), shape=[2, 3, 10, 4])


@pytest.mark.parametrize(
    "body",
    [
        by_matmul,
        by_matmul_scaled_after,
        by_matmul_on_columns,
        by_matmul_weights_first,
        by_matmul_keys_first,
        by_batched_matmul,
    ],
)
def test_attention_of_all_heads_at_once(body: Body, save_program: Callable[..., Path]) -> None:
    shapes = {"q": (2, 3, 10, 4), "k": (2, 3, 7, 4), "v": (2, 3, 7, 4)}
    found = fused_ops(save_program(body, **shapes), *shapes.values())
    assert found["attend"] == 1
    assert not {"matmul", "softmax", "mul", "real_div"} & set(found)


@pytest.mark.parametrize("mask", [(10, 7), (1, 1, 10, 7), (2, 3, 10, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("scaled", [False, True])
def test_attention_with_a_mask(mask: tuple[int, ...], scaled: bool, save_program: Callable[..., Path]) -> None:
    def body(mb: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
        scores = mb.matmul(x=q, y=k, transpose_y=True)
        scores = mb.add(x=m, y=mb.mul(x=scores, y=np.float32(0.3)) if scaled else scores)
        return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)

    shapes = {"q": (2, 3, 10, 4), "k": (2, 3, 7, 4), "v": (2, 3, 7, 4), "m": mask}
    assert fused_ops(save_program(body, **shapes), *shapes.values()) == Counter(["attend"])


def heads_of(mb: Any, t: Any, axis: int, heads: int, sliced: bool) -> list[Any]:
    """The parts of ``t`` along ``axis``, by one split or by slices."""
    if not sliced:
        return list(mb.split(x=t, num_splits=heads, axis=axis))
    each = t.shape[axis] // heads
    parts = []
    for head in range(heads):
        begin, end = [0] * 4, list(t.shape)
        begin[axis], end[axis] = head * each, (head + 1) * each
        masks = [place != axis for place in range(4)]
        parts.append(mb.slice_by_index(x=t, begin=begin, end=end, begin_mask=masks, end_mask=masks))
    return parts


def split_attention(
    heads: int = 3,
    sliced: bool = False,
    chunks: tuple[int, ...] = (),
    masked: bool = False,
) -> Body:
    """(batch, channels, 1, length): one chain per head, the query in chunks."""

    def body(mb: Any, q: Any, k: Any, v: Any, *mask: Any) -> Any:
        keys = mb.mul(x=mb.transpose(x=k, perm=[0, 3, 2, 1]), y=np.float32(0.3))
        mixed = []
        triples = zip(heads_of(mb, q, 1, heads, sliced), heads_of(mb, keys, 3, heads, sliced),
                      heads_of(mb, v, 1, heads, sliced), strict=True)  # fmt: skip
        for query, key, value in triples:
            parts = mb.split(x=query, split_sizes=list(chunks), axis=3) if chunks else [query]
            done = [one(mb, part, key, value, *mask) for part in parts]
            mixed.append(mb.concat(values=done, axis=3) if chunks else done[0])
        return mb.concat(values=mixed, axis=1)

    def one(mb: Any, query: Any, key: Any, value: Any, *mask: Any) -> Any:
        scores = mb.einsum(values=(key, query), equation="bkhc,bchq->bkhq")
        weights = mb.softmax(x=mb.add(x=scores, y=mask[0]) if mask else scores, axis=1)
        return mb.einsum(values=(value, weights), equation="bchk,bkhq->bchq")

    return body


SPLIT = {"q": (2, 12, 1, 10), "k": (2, 12, 1, 7), "v": (2, 12, 1, 7)}


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("chunks", [(), (5, 5), (4, 4, 2)])
def test_split_attention_becomes_one_node(
    sliced: bool, chunks: tuple[int, ...], save_program: Callable[..., Path]
) -> None:
    body = split_attention(sliced=sliced, chunks=chunks)
    assert fused_ops(save_program(body, **SPLIT), *SPLIT.values()) == Counter(["attend"])


def test_split_attention_with_a_mask(save_program: Callable[..., Path]) -> None:
    shapes = {**SPLIT, "m": (1, 7, 1, 10)}
    assert fused_ops(save_program(split_attention(), **shapes), *shapes.values()) == Counter(["attend"])


def test_values_may_be_wider_than_keys(save_program: Callable[..., Path]) -> None:
    shapes = {**SPLIT, "v": (2, 24, 1, 7)}
    assert fused_ops(save_program(split_attention(), **shapes), *shapes.values()) == Counter(["attend"])


@pytest.mark.parametrize("order", [(1, 0), (0, 0)])
def test_heads_in_another_order_are_not_merged(order: tuple[int, int], save_program: Callable[..., Path]) -> None:
    def body(mb: Any, q: Any, k: Any, v: Any) -> Any:
        queries, keys, values = (mb.split(x=t, num_splits=2, axis=1) for t in (q, k, v))
        mixed = []
        for head in (0, 1):
            key = mb.transpose(x=keys[order[head]], perm=[0, 3, 2, 1])
            scores = mb.softmax(x=mb.einsum(values=(key, queries[head]), equation="bkhc,bchq->bkhq"), axis=1)
            mixed.append(mb.einsum(values=(values[head], scores), equation="bchk,bkhq->bchq"))
        return mb.concat(values=mixed, axis=1)

    assert fused_ops(save_program(body, **SPLIT), *SPLIT.values())["attend"] == 2


@pytest.mark.parametrize("fault", ["softmax over queries", "weights used twice", "broadcast keys"])
def test_what_is_nearly_attention_stays(fault: str, save_program: Callable[..., Path]) -> None:
    def body(mb: Any, q: Any, k: Any, v: Any) -> Any:
        scores = mb.matmul(x=q, y=k, transpose_y=True)
        weights = mb.softmax(x=scores, axis=2 if fault == "softmax over queries" else 3)
        mixed = mb.matmul(x=weights, y=v)
        return (mixed, mb.reduce_sum(x=weights, axes=[2])) if fault == "weights used twice" else mixed

    keys = 1 if fault == "broadcast keys" else 3
    shapes = {"q": (2, 3, 10, 4), "k": (2, keys, 7, 4), "v": (2, 3, 7, 4)}
    assert fused_ops(save_program(body, **shapes), *shapes.values())["attend"] == 0


# --- convolutions and memory

WEIGHT = RANDOM.standard_normal((6, 8, 3, 3)).astype(np.float32)
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "padded": {"pad_type": "custom", "pad": [1, 1, 1, 1]},
    "strided": {"strides": [2, 1], "dilations": [1, 2]},
    "unevenly padded": {"pad_type": "custom", "pad": [0, 1, 1, 0]},
    "same": {"pad_type": "same", "strides": [2, 2]},
    "grouped": {"groups": 2, "weight": WEIGHT[:, :4]},
    "pointwise": {"weight": WEIGHT[:, :, :1, :1], "bias": np.ones(6, np.float32)},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_keep_their_results(kind: str, save_program: Callable[..., Path]) -> None:
    options = {"weight": WEIGHT, **CONVOLUTIONS[kind]}
    path = save_program(lambda mb, x: mb.conv(x=x, **options), x=(2, 8, 7, 6))
    assert fused_ops(path, (2, 8, 7, 6)) == Counter(["conv"])


@pytest.mark.skipif(platform.machine() not in X86, reason="oneDNN packs kernels for x86")
def test_kernels_lie_as_onednn_wants_them(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.conv(x=x, weight=WEIGHT), x=(2, 8, 7, 6))
    module = fuse(lower(open_package(path)))
    assert [buffer.is_mkldnn for buffer in module.buffers()] == [True]
    assert not any(buffer.is_mkldnn for buffer in fuse(lower(open_package(path)), WATCHABLE).buffers())


def test_a_weight_that_two_convolutions_share(save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        weight = mb.const(val=WEIGHT, name="shared")
        return mb.concat(values=[mb.conv(x=x, weight=weight), mb.conv(x=mb.square(x=x), weight=weight)], axis=1)

    assert fused_ops(save_program(body, x=(2, 8, 7, 6)), (2, 8, 7, 6))["conv"] == 2


def test_values_that_are_needed_later_are_not_overwritten(save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        twice = mb.add(x=x, y=x, name="twice")
        own = mb.add(x=mb.sub(x=twice, y=np.float32(1)), y=mb.silu(x=twice), name="own")
        wide = mb.add(x=mb.reduce_mean(x=own, axes=[1], keep_dims=True), y=own, name="wide")
        squared = mb.sub(x=wide, y=np.float32(3), name="squared")
        return mb.mul(x=squared, y=squared, name="product"), own, mb.silu(x=twice, name="again")

    fused_ops(save_program(body, x=(4, 8)), (4, 8))
    module = fuse(lower(open_package(save_program(body, x=(4, 8)))))
    assert "add_into" in module.code


def test_swallowed_constants_are_freed(save_program: Callable[..., Path]) -> None:
    def body(mb: Any, x: Any) -> Any:
        y = mb.reshape(x=normalized(mb, mb.reshape(x=x, shape=[2, 4, 2, 15]), [2, 3]), shape=[2, 8, 5, 3])
        return mb.add(x=mb.mul(x=y, y=GAMMA), y=BETA)

    module = fuse(lower(open_package(save_program(body, x=(2, 8, 5, 3)))))
    assert sorted(tuple(buffer.shape) for buffer in module.buffers()) == [(8,), (8,)]


def watched(module: fx.GraphModule, inputs: list[torch.Tensor]) -> list[tuple[str, str, torch.Tensor]]:
    found: list[tuple[str, str, torch.Tensor]] = []
    observe(module, inputs, lambda name, op, value: found.append((name, op, value)))
    return found


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_scores_that_are_swallowed_are_shown_by_a_bound_and_in_parts_where_they_may_be_large(
    split: bool, factor: float, save_program: Callable[..., Path]
) -> None:
    """The factor lies before the product or after it; where it is above 1, so must be what is shown."""

    def body(mb: Any, q: Any, k: Any, v: Any) -> Any:
        if split:
            return split_attention(chunks=(4, 4, 2))(mb, q, mb.mul(x=k, y=np.float32(factor)), v)
        scores = mb.mul(x=mb.matmul(x=q, y=k, transpose_y=True, name="product"), y=np.float32(factor))
        return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)

    shapes = SPLIT if split else {"q": (2, 3, 10, 4), "k": (2, 3, 7, 4), "v": (2, 3, 7, 4)}
    package = open_package(save_program(body, **shapes))
    whole, pieces = lower(package), fuse(lower(package), WATCHABLE)
    assert ops(pieces)["attend"] == 1
    for size, count in ((1, 1), (300, 2)):
        inputs = [
            torch.randn(shape, generator=torch.Generator().manual_seed(1)) * size for shape in shapes.values()
        ]
        scores = [
            float(value.abs().max())
            for _, op, value in watched(whole, inputs)
            if op in ("matmul", "einsum", "mul", "softmax")
        ]
        shown = [value for name, _, value in watched(pieces, inputs) if SCORES in name]
        largest = max(float(value.abs().max()) for value in shown)
        assert largest >= max(scores) * (1 - 1e-6)
        assert (shown[0].numel() == 1) == (count == 1)  # a bound; what is shown of large ones are the scores
        assert largest < FAR if count == 1 else largest > FAR


def test_what_a_factor_makes_of_queries_is_watched_where_scores_are_small(
    save_program: Callable[..., Path],
) -> None:
    """Nothing but their product with the keys would be seen of them in one piece."""

    def body(mb: Any, q: Any, k: Any, v: Any) -> Any:
        scores = mb.matmul(x=mb.mul(x=q, y=np.float32(8)), y=k, transpose_y=True)
        return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)

    shapes = {"q": (1, 2, 10, 4), "k": (1, 2, 7, 4), "v": (1, 2, 7, 4)}
    module = fuse(lower(open_package(save_program(body, **shapes))), WATCHABLE)
    assert ops(module)["attend"] == 1
    inputs = [torch.full(shape, size) for shape, size in zip(shapes.values(), (2e4, 1e-3, 1.0), strict=True)]
    shown = [float(value.abs().max()) for name, _, value in watched(module, inputs) if SCORES in name]
    assert max(shown) == pytest.approx(1.6e5)


def test_a_mask_is_watched(save_program: Callable[..., Path]) -> None:
    shapes = {**SPLIT, "m": (1, 7, 1, 10)}
    module = fuse(lower(open_package(save_program(split_attention(masked=True), **shapes))), WATCHABLE)
    assert ops(module)["attend"] == 0
