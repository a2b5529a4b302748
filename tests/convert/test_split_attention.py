"""Attention that is split after the conversion is what it would be if each head and chunk had been traced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention as Theirs

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.export import export as exporting
from diffusion_convert.export.export import Exported, ExportOptions, export, mil_name
from diffusion_convert.export.split_attention import Pieces, in_one_piece, split
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.transformer import Attention, SpatialAttention
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.package import Package, open_package
from diffusion_runtime.mil.program import DType, Metadata, TensorType, Value

WIDTH, QUERIES, TEXT = 8, 600, 7
V2 = ExportOptions(AttentionKind.SPLIT_EINSUM_V2, Shape(64, 64, 2), "macOS13")


class Network(torch.nn.Module):
    """Two heads over itself and over a text, and one head over positions, as in a VAE."""

    def __init__(self, kind: AttentionKind) -> None:
        super().__init__()
        torch.manual_seed(0)
        attend = ATTENTION[kind]
        theirs = [
            Theirs(WIDTH, heads=2, dim_head=4, out_bias=True, cross_attention_dim=width) for width in (None, 5)
        ]
        self.alone, self.crossed = (Attention(one, attend) for one in theirs)
        one_head = Theirs(WIDTH, heads=1, dim_head=8, norm_num_groups=2, bias=True, residual_connection=True)
        self.spatial = SpatialAttention(one_head, attend)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.crossed(self.alone(x) + x, text) + x
        found: torch.Tensor = self.spatial(x.reshape(2, WIDTH, 20, QUERIES // 20))
        return found


def built(_: Checkpoint, kind: AttentionKind | None, __: Shape) -> Graph:
    x, text = Port("x", (2, WIDTH, 1, QUERIES)), Port("text", (2, 5, 1, TEXT))
    out = Port("y", (2, WIDTH, 20, QUERIES // 20), "float32")
    return Graph(Network(kind or AttentionKind.ORIGINAL).eval(), (x, text), (out,), lambda _: {})


@pytest.fixture
def made(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[[str, ExportOptions], tuple[Exported, Package]]:
    def make(name: str, options: ExportOptions) -> tuple[Exported, Package]:
        checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
        path = tmp_path / f"{name}.mlpackage"
        return export(Component("unet", built, 60.0), checkpoint, options, path, Metadata()), open_package(path)

    return make


@contextmanager
def as_traced(_: torch.nn.Module) -> Iterator[Mapping[str, Pieces]]:
    yield {}


@pytest.mark.parametrize(
    "options",
    [
        V2,
        replace(V2, attention=AttentionKind.SPLIT_EINSUM),
        replace(V2, attention=AttentionKind.ORIGINAL),
        replace(V2, float32_modules=frozenset({"crossed"}), target="macOS15"),
    ],
    ids=["v2", "split_einsum", "original", "float32"],
)
def test_the_program_is_that_of_traced_heads_and_chunks(
    options: ExportOptions, made: Callable[[str, ExportOptions], tuple[Exported, Package]]
) -> None:
    exported, package = made("split", options)
    with mock.patch.object(exporting, "in_one_piece", as_traced):
        traced, theirs = made("traced", options)
    values, their_values = computed(package), computed(theirs)
    assert sorted(values.values()) == sorted(their_values.values())
    assert values["y"] == their_values["y"]
    assert {values[name]: path for name, path in exported.modules.items()} == {
        their_values[name]: path for name, path in traced.modules.items()
    }
    assert weights(package) == weights(theirs)


def computed(package: Package) -> dict[str, str]:
    """What each value is computed of, down to constants and inputs, as a hash: of equal hashes are equal values."""
    block = package.model.function.block
    known = {variable.name: variable.name for variable in package.model.function.inputs}
    constants = {}
    for operation in block.operations:
        if operation.type == "const":
            constants[operation.outputs[0].name] = literal(package, operation.attributes["val"])
            continue
        taken = [
            (
                name,
                [(known | constants)[one] if isinstance(one, str) else literal(package, one) for one in bindings],
            )
            for name, bindings in sorted(operation.inputs.items())
        ]
        for index, variable in enumerate(operation.outputs):
            text = repr((operation.type, taken, index, variable.type))
            known[variable.name] = hashlib.sha256(text.encode()).hexdigest()
    return {name: value for name, value in known.items() if name != value}


def literal(package: Package, value: Value) -> str:
    stored = value.data if isinstance(value.data, (str, tuple)) else package.array(value).tobytes()
    return repr((value.type, stored))


def weights(package: Package) -> bytes:
    return next(package.path.rglob("weight.bin")).read_bytes()


def test_every_copy_of_an_operation_is_in_its_precision(
    made: Callable[[str, ExportOptions], tuple[Exported, Package]],
) -> None:
    """And so it computes what the plain one does: casts go where the precision changes, in every head and chunk."""
    _, plain = made("plain", V2)
    softmax = next(op for op in plain.model.function.block.operations if op.type == "softmax")
    name = mil_name(softmax.outputs[0].name)
    exported, package = made("mixed", replace(V2, float32_ops=frozenset({name})))
    kept = {
        variable.name: variable.type.dtype
        for operation in package.model.function.block.operations
        if operation.type == "softmax"
        for variable in operation.outputs
        if isinstance(variable.type, TensorType)
    }
    wide = [one for one, dtype in kept.items() if dtype is DType.FLOAT32]
    assert wide == [one for one in kept if mil_name(one) == name]
    assert len(wide) == 4
    assert set(wide) < set(exported.modules)
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.standard_normal((2, WIDTH, 1, QUERIES)).astype("float16"),
        "text": rng.standard_normal((2, 5, 1, TEXT)).astype("float16"),
    }
    one, two = (TorchBackend(fuse=False).load(item.path)(**arrays)["y"] for item in (plain, package))
    np.testing.assert_array_equal(one, two)


def test_the_network_is_left_as_it_was() -> None:
    network = Network(AttentionKind.SPLIT_EINSUM_V2)
    with pytest.raises(RuntimeError), in_one_piece(network) as pieces:
        assert pieces == {"alone": Pieces(2, 512), "crossed": Pieces(2, 512), "spatial": Pieces(1, 512)}
        assert network.alone.heads == 1
        raise RuntimeError
    assert (network.alone.heads, network.spatial.heads) == (2, 1)
    assert network.alone.attend is ATTENTION[AttentionKind.SPLIT_EINSUM_V2]


def test_an_attention_that_is_not_found_is_refused(
    made: Callable[[str, ExportOptions], tuple[Exported, Package]],
) -> None:
    """With one head in place of two, a model would be wrong without an error."""
    exported, package = made("original", replace(V2, attention=AttentionKind.ORIGINAL))
    with pytest.raises(UnsupportedError, match=r"coremltools made something else .*: alone"):
        split(package.model, {"alone": Pieces(2, 512)}, exported.modules)


@pytest.mark.parametrize(("queries", "sizes"), [(1, [1]), (512, [512]), (600, [512, 88]), (1024, [512, 512])])
def test_the_last_chunk_has_what_is_left(queries: int, sizes: list[int]) -> None:
    assert Pieces(2, 512).sizes(queries) == sizes
    assert Pieces(2, 0).sizes(queries) == [queries]
