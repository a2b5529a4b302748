"""The attention kinds agree with torch's own attention at every length, and stay what they are in the program."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch

from diffusion_convert.networks.attention import ATTENTION
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


@pytest.mark.parametrize("kind", AttentionKind)
def test_packages_agree_with_torch(kind: AttentionKind, tmp_path: Path) -> None:
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
        minimum_deployment_target=ct.target.macOS13,
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


def converted(kind: AttentionKind, queries: int, keys: int, heads: int = HEADS) -> collections.Counter[str]:
    """How often each operation stands in the program of one attention."""

    class Module(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return ATTENTION[kind](query, key, value, heads, SCALE)

    ct = import_coremltools()
    traced = torch.jit.trace(Module().eval(), random_qkv(1, queries, keys), check_trace=False)  # type: ignore[no-untyped-call]
    program = ct.convert(
        traced,
        inputs=[
            ct.TensorType(name, (1, HEADS * EACH, 1, length))
            for name, length in (("query", queries), ("key", keys), ("value", keys))
        ],
        convert_to="milinternal",
        minimum_deployment_target=ct.target.macOS13,
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
        # 3 reshapes in, scale, 2 products, softmax, 1 reshape out: no transpose is left.
        (AttentionKind.ORIGINAL, 8),
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
