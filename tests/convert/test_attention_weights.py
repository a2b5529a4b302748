"""`original` attention in whole programs: never a product with transposed weights, which aborts on macOS 26's GPU;
from macOS 15 on one operation, and as near to the checkpoint's own network as ever."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attention_weights
import tiny_checkpoints
from diffusion_convert import convert
from diffusion_convert.components import table
from diffusion_convert.options import ConvertOptions, Precision
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import operations
from read_back import check_read_back

TEXT = "text_encoder/model.safetensors"
EACH = (
    tiny_checkpoints.RECIPES["sd1"].text["hidden_size"]
    // tiny_checkpoints.RECIPES["sd1"].text["num_attention_heads"]
)


def counts(path: Path) -> Counter[str]:
    return Counter(one.type for one in operations(open_package(path).model.function.block))


NEW = tiny_checkpoints.new_attentions()


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_every_attention_of_every_family_on_new_systems(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Once each: the VAE of the next family is the same program, an inpainting UNet has the plain one's blocks."""
    options = ConvertOptions("original", components=NEW[family], target="macOS15", compiled=False, zip=False)
    made = convert(tiny_checkpoint(family), tmp_path / "models", options)
    assert made.variants["original"].components.keys() == set(NEW[family])
    for name, component in made.variants["original"].components.items():
        path = made.output / "original" / "packages" / component.files[0]
        found = counts(path)
        assert found["scaled_dot_product_attention"], name
        assert not found["softmax"], name
        assert not component.float32_ops, name
        assert min(component.psnr_db.values()) >= table()[name].min_psnr_db >= 60, (name, component.psnr_db)
        check_read_back(path, tmp_path, name)  # what `compile` writes, with this operation in it


@pytest.mark.filterwarnings("ignore:Output")
def test_a_transposed_product_is_found(tmp_path: Path) -> None:
    """The walk sees what is looked for: this is what `original` was before."""

    class Module(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            weights = (query.transpose(2, 3) @ key).softmax(dim=3)
            return value @ weights.transpose(2, 3) + (weights @ value.transpose(2, 3)).transpose(2, 3)

    example = torch.zeros(1, 2, 8, 16)
    ct = import_coremltools()
    path = tmp_path / "attention.mlpackage"
    ct.convert(
        torch.jit.trace(Module().eval(), (example,) * 3),  # type: ignore[no-untyped-call]
        inputs=[ct.TensorType(name, example.shape) for name in ("query", "key", "value")],
        minimum_deployment_target=ct.target.macOS13,
        skip_model_load=True,
    ).save(str(path))
    assert sorted(attention_weights.products(open_package(path).model).values()) == [False, True]


@pytest.fixture(scope="module")
def loud(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text encoder has scores beyond float16, of queries and keys that are not: all keys have a
    large part in common, which changes every score of a query alike, and so no weight."""
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path_factory.mktemp("loud") / "checkpoint")
    weights = {name: value.float() for name, value in load_file(folder / TEXT).items()}
    attention = "text_model.encoder.layers.0.self_attn"
    weights[f"{attention}.q_proj.bias"] += 1
    weights[f"{attention}.k_proj.bias"] += 1e5 / EACH
    save_file({name: value.half() for name, value in weights.items()}, folder / TEXT)
    return folder


def text_encoder(source: Path, output: Path, precision: Precision) -> tuple[Path, tuple[str, ...]]:
    options = ConvertOptions(
        "original", components="text_encoder", precision=precision, target="macOS15", compiled=False
    )
    made = convert(source, output, options)
    component = made.variants["original"].components["text_encoder"]
    return made.output / "original" / "packages" / component.files[0], component.float32_ops


def test_scores_that_no_value_shows_are_kept_from_overflowing(loud: Path, tmp_path: Path) -> None:
    """Queries, keys and results of the fused operation fit float16 here, and the scores in it do not."""
    path, wide = text_encoder(loud, tmp_path / "models", Precision.AUTO)
    fused = [
        one.outputs[0]
        for one in operations(open_package(path).model.function.block)
        if one.type == "scaled_dot_product_attention"
    ]
    types = {str(getattr(one.type, "dtype", "")) for one in fused[:1]}
    assert types == {"DType.FLOAT32"}
    assert fused[0].name in wide
    with pytest.raises(VerificationError, match="float16 overflows at"):
        text_encoder(loud, tmp_path / "half", Precision.FLOAT16)


def test_a_healthy_one_stays_float16(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert text_encoder(tiny_checkpoint("sd1"), tmp_path / "models", Precision.AUTO)[1] == ()
