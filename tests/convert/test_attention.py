"""The attention kinds agree with torch's own attention at every length, and stay what they are in the program."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch

from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.attention.original import MASKED_BATCH
from diffusion_convert.networks.attention.split_einsum_v2 import QUERY_CHUNK, chunk_sizes
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.families import AttentionKind

pytestmark = pytest.mark.filterwarnings("ignore")  # the tracer's, about sizes that are meant to be fixed

HEADS, EACH, SCALE = 2, 8, 8**-0.5
# Positions of latents: 512 and 576 (24x24), 768 (24x32), 24x40, 1600 (40x40, from 640 pixels at half the size),
# 2304 (48x48, from 768 pixels at half the size); and fewer than one chunk.
POSITIONS = (64, 512, 576, 768, 24 * 40, 1600, 2304)
TEXT_LENGTH = 77
AGREEMENT_DB = 60.0


def random_qkv(batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + keys + batch)
    shapes = ((batch, HEADS * EACH, 1, length) for length in (queries, keys, keys))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention in double precision, in this layout."""
    q, k, v = (x.double().reshape(x.shape[0], HEADS, EACH, x.shape[3]).transpose(2, 3) for x in (query, key, value))
    bias = None if mask is None else mask.double().permute(0, 2, 3, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)
    return out.transpose(2, 3).reshape(query.shape)


def psnr_db(wanted: torch.Tensor, got: torch.Tensor) -> float:
    assert wanted.shape == got.shape
    return float(20 * torch.log10(wanted.abs().max() / (wanted - got).double().pow(2).mean().sqrt()))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("queries", POSITIONS)
@pytest.mark.parametrize("own_keys", [True, False], ids=["self", "cross"])
def test_agrees_with_torch(batch: int, queries: int, own_keys: bool) -> None:
    qkv = random_qkv(batch, queries, queries if own_keys else TEXT_LENGTH)
    wanted = expected(*qkv)
    got = {kind.value: psnr_db(wanted, attend(*qkv, HEADS, SCALE)) for kind, attend in ATTENTION.items()}
    assert min(got.values()) >= AGREEMENT_DB, got


@pytest.mark.parametrize("target", ["macOS13", "macOS15"])
@pytest.mark.parametrize("kind", AttentionKind)
def test_packages_agree_with_torch(kind: AttentionKind, target: str, tmp_path: Path) -> None:
    """One package with an attention of every length, self and cross, batch 1 and 2, run by the torch backend."""
    sizes = [(batch, queries, keys) for batch in (1, 2) for queries in POSITIONS for keys in (queries, TEXT_LENGTH)]

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            triples = (tensors[index : index + 3] for index in range(0, len(tensors), 3))
            return tuple(ATTENTION[kind](query, key, value, HEADS, SCALE) for query, key, value in triples)

    drawn = [random_qkv(*size) for size in sizes]
    arrays = {f"x{index}": tensor for index, tensor in enumerate(tensor for qkv in drawn for tensor in qkv)}
    ct = import_coremltools()
    ct.convert(
        torch.jit.trace(Module().eval(), tuple(arrays.values()), check_trace=False),  # type: ignore[no-untyped-call]
        inputs=[ct.TensorType(name, tensor.shape) for name, tensor in arrays.items()],
        outputs=[ct.TensorType(f"y{index}") for index in range(len(sizes))],
        minimum_deployment_target=getattr(ct.target, target),
        skip_model_load=True,
    ).save(str(tmp_path / "attention.mlpackage"))
    model = TorchBackend().load(tmp_path / "attention.mlpackage")
    got = model(**{name: tensor.numpy() for name, tensor in arrays.items()})
    parity = {
        size: psnr_db(expected(*qkv), torch.from_numpy(got[f"y{index}"]))
        for index, (size, qkv) in enumerate(zip(sizes, drawn, strict=True))
    }
    assert min(parity.values()) >= AGREEMENT_DB, parity


@pytest.mark.parametrize("kind", AttentionKind)
@pytest.mark.parametrize("queries", [TEXT_LENGTH, 576])
def test_mask_is_added_to_the_scores(kind: AttentionKind, queries: int) -> None:
    qkv = random_qkv(1, queries, queries)
    mask = torch.full((queries, queries), -1e4).tril(-1)[None, :, None]
    got = ATTENTION[kind](*qkv, HEADS, SCALE, mask)
    assert psnr_db(expected(*qkv, mask), got) >= AGREEMENT_DB
    # The first query sees the first key alone.
    assert torch.allclose(got[..., 0], qkv[2][..., 0])


def test_every_kind_has_a_function() -> None:
    assert set(ATTENTION) == set(AttentionKind)


@pytest.mark.parametrize("queries", [1, QUERY_CHUNK - 1, QUERY_CHUNK, QUERY_CHUNK + 1, 2304, 12544])
def test_chunks_cover_every_query(queries: int) -> None:
    sizes = chunk_sizes(queries)
    assert sum(sizes) == queries
    assert all(size == QUERY_CHUNK for size in sizes[:-1])
    assert 0 < sizes[-1] <= QUERY_CHUNK


def converted(
    kind: AttentionKind,
    queries: int,
    keys: int,
    heads: int = HEADS,
    target: str = "macOS13",
    batch: int = 1,
    masked: bool = False,
    scale: float | None = None,
) -> collections.Counter[str]:
    """How often each operation stands in the program of one attention."""
    mask = torch.full((keys, queries), -1e4).tril(-1)[None, :, None] if masked else None

    class Module(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            own = (HEADS * EACH // heads) ** -0.5
            return ATTENTION[kind](query, key, value, heads, scale or own, mask)

    ct = import_coremltools()
    traced = torch.jit.trace(Module().eval(), random_qkv(batch, queries, keys), check_trace=False)  # type: ignore[no-untyped-call]
    program = ct.convert(
        traced,
        inputs=[
            ct.TensorType(name, (batch, HEADS * EACH, 1, length))
            for name, length in (("query", queries), ("key", keys), ("value", keys))
        ],
        convert_to="milinternal",
        minimum_deployment_target=getattr(ct.target, target),
    )
    operations = [operation for operation in program.functions["main"].operations if operation.op_type != "const"]
    assert all(len(output.shape) <= 4 for operation in operations for output in operation.outputs)
    return collections.Counter(operation.op_type for operation in operations)


def test_split_kinds_stay_einsum_operations_and_the_original_has_none() -> None:
    assert converted(AttentionKind.ORIGINAL, 576, 77)["einsum"] == 0
    assert converted(AttentionKind.SPLIT_EINSUM, 576, 77)["einsum"] == 2 * HEADS
    chunks = len(chunk_sizes(576))
    assert converted(AttentionKind.SPLIT_EINSUM_V2, 576, 77)["einsum"] == 2 * HEADS * chunks


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        # 3 reshapes in, scale, 2 products, softmax, 1 transpose and 1 reshape out
        (AttentionKind.ORIGINAL, 9),
        # transpose, scale, 3 splits, 3 per head, concat
        (AttentionKind.SPLIT_EINSUM, 6 + 3 * HEADS),
        # the same, and per head 1 split, 3 per chunk, 1 concat; 1100 queries are three chunks
        (AttentionKind.SPLIT_EINSUM_V2, 6 + HEADS * (1 + 3 * 3 + 1)),
    ],
)
def test_programs_have_no_needless_operations(kind: AttentionKind, count: int) -> None:
    operations = converted(kind, 1100, 77)
    operations.pop("cast", None)
    assert operations.total() == count, operations


@pytest.mark.parametrize("kind", AttentionKind)
def test_one_head_needs_no_split_and_no_concat(kind: AttentionKind) -> None:
    operations = converted(kind, 64, 64, heads=1)
    assert not operations["split"]
    assert not operations["concat"]


@pytest.mark.parametrize("target", ["macOS15", "iOS18", "macOS26"])
def test_new_systems_get_the_fused_operation_and_old_ones_two_products(target: str) -> None:
    for masked in (False, True):
        new = converted(AttentionKind.ORIGINAL, 77, 77, target=target, masked=masked)
        assert new["scaled_dot_product_attention"] == 1
        assert not new["matmul"] + new["softmax"]
    old = converted(AttentionKind.ORIGINAL, 77, 77, target="macOS14")
    assert (old["scaled_dot_product_attention"], old["matmul"], old["softmax"]) == (0, 2, 1)


def test_no_fused_operation_where_it_is_wrong() -> None:
    """Batches of ten and more with a mask; without a mask it is right there."""
    masked = {
        batch: converted(AttentionKind.ORIGINAL, 64, 64, target="macOS15", batch=batch, masked=True)
        for batch in (MASKED_BATCH - 1, MASKED_BATCH)
    }
    assert [found["scaled_dot_product_attention"] for found in masked.values()] == [1, 0]
    plain = converted(AttentionKind.ORIGINAL, 64, 64, target="macOS15", batch=MASKED_BATCH)
    assert plain["scaled_dot_product_attention"] == 1


@pytest.mark.parametrize("batch", [1, MASKED_BATCH])
def test_every_batch_and_scale_agrees_with_torch(batch: int) -> None:
    queries = 96
    qkv = random_qkv(batch, queries, queries)
    mask = torch.full((queries, queries), -1e4).tril(-1)[None, :, None]
    q, k, v = (x.double().reshape(batch, HEADS, EACH, queries).transpose(2, 3) for x in qkv)
    for scale in (SCALE, 1.0):
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.double().permute(0, 2, 3, 1), scale=scale
        )
        got = ATTENTION[AttentionKind.ORIGINAL](*qkv, HEADS, scale, mask)
        assert psnr_db(wanted.transpose(2, 3).reshape(qkv[0].shape), got) >= AGREEMENT_DB, scale


def test_another_scale_than_the_operations_own_is_a_factor_of_the_query() -> None:
    found = converted(AttentionKind.ORIGINAL, 64, 64, target="macOS15", scale=1.0)
    assert (found["scaled_dot_product_attention"], found["mul"]) == (1, 1)
    assert not converted(AttentionKind.ORIGINAL, 64, 64, target="macOS15")["mul"]
