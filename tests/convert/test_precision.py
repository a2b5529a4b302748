"""float16 overflows: found, named, and cured where they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert import convert
from diffusion_convert.components import table
from diffusion_convert.conversion.convert import Conversion
from diffusion_convert.export.placeholders import FLOAT16_MAX
from diffusion_convert.options import ConvertOptions, Precision
from diffusion_convert.verification.compare import NEAR_LIMIT
from diffusion_runtime.errors import VerificationError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import DType, TensorType, operations

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def loud(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose VAE's decoder begins with values 20,000 times larger; its norms bring them down again."""
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path_factory.mktemp("loud") / "checkpoint")
    weights = {name: value.float() for name, value in load_file(folder / VAE).items()}
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        weights[name] = weights[name] * 2e4
    save_file({name: value.half() for name, value in weights.items()}, folder / VAE)
    return folder


@pytest.fixture(scope="module")
def quietened(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return decoder(loud, tmp_path_factory.mktemp("quietened") / "models", Precision.AUTO)


def decoder(source: Path, output: Path, precision: Precision) -> Conversion:
    options = ConvertOptions(
        attention=(AttentionKind.ORIGINAL,), components=("vae_decoder",), precision=precision, compiled=False
    )
    return convert(source, output, options)


def float32_values(made: Conversion, name: str) -> set[str]:
    """The values in the package that are float32, other than constants, casts and the output."""
    variant = made.variants["original"]
    package = open_package(made.output / "original" / "packages" / variant.components[name].files[0])
    block = package.model.program.functions["main"].block
    return {
        variable.name
        for operation in operations(block)
        for variable in operation.outputs
        if operation.type not in ("const", "cast")
        and isinstance(variable.type, TensorType)
        and variable.type.dtype is DType.FLOAT32
        and variable.name not in block.outputs
    }


def test_auto_keeps_float32_where_it_is_needed(quietened: Conversion) -> None:
    component = quietened.variants["original"].components["vae_decoder"]
    assert component.float32_ops
    assert set(component.float32_ops) == float32_values(quietened, "vae_decoder")
    assert component.psnr_db["image"] >= table()["vae_decoder"].min_psnr_db
    assert any("stay in float32" in note and "decoder.conv_in" in note for note in quietened.notes)


def test_the_rest_stays_float16(quietened: Conversion) -> None:
    """Behind the last norm, values are small again."""
    package = next((quietened.output / "original" / "packages").glob("*.mlpackage"))
    types = {
        variable.type.dtype
        for operation in operations(open_package(package).model.program.functions["main"].block)
        if operation.type == "conv"
        for variable in operation.outputs
        if isinstance(variable.type, TensorType)
    }
    assert types == {DType.FLOAT16, DType.FLOAT32}


def test_float16_refuses_with_names(loud: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"float16 overflows at .*torch module decoder\.conv_in") as raised:
        decoder(loud, tmp_path / "models", Precision.FLOAT16)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_healthy_one_keeps_none(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    made = decoder(tiny_checkpoint("sd1"), tmp_path / "models", Precision.AUTO)
    assert made.variants["original"].components["vae_decoder"].float32_ops == ()
    assert float32_values(made, "vae_decoder") == set()
    assert made.notes == ()


def test_float32_is_float32(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    made = decoder(tiny_checkpoint("sd1"), tmp_path / "models", Precision.FLOAT32)
    component = made.variants["original"].components["vae_decoder"]
    assert component.precision == "float32"
    assert len(float32_values(made, "vae_decoder")) > 50


@pytest.mark.parametrize("precision", [Precision.AUTO, Precision.FLOAT16])
def test_a_weight_beyond_float16(
    precision: Precision, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "checkpoint")
    weights = {name: value.float() for name, value in load_file(folder / VAE).items()}
    weights["decoder.conv_in.weight"][0, 0, 0, 0] = 2 * FLOAT16_MAX
    save_file(weights, folder / VAE)
    if precision is Precision.FLOAT16:
        with pytest.raises(VerificationError, match=r"decoder\.conv_in\.weight"):
            decoder(folder, tmp_path / "models", precision)
        return
    made = decoder(folder, tmp_path / "models", precision)
    assert any("decoder.conv_in.weight" in note for note in made.notes)
    assert made.variants["original"].components["vae_decoder"].psnr_db["image"] >= 60


def test_limit_is_a_factor_of_two_below_the_largest_float16() -> None:
    assert torch.finfo(torch.float16).max == FLOAT16_MAX
    assert NEAR_LIMIT * 2 == FLOAT16_MAX


def test_damaged_weights_are_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint("sd1"), tmp_path / "checkpoint")
    weights = load_file(folder / VAE)
    weights["decoder.conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, folder / VAE)
    with pytest.raises(Exception, match="damaged"):
        decoder(folder, tmp_path / "models", Precision.AUTO)
    assert json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize(
    ("force_upcast", "louder", "precision", "kept"),
    [(True, 1.0, "float32", False), (False, 1.0, "float16", False), (False, 2e4, "float16", True)],
)
def test_what_the_manifest_says_of_sdxls_vae(
    force_upcast: bool,
    louder: float,
    precision: str,
    kept: bool,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """One that says that it overflows is in float32 as a whole; where one that says that it does not overflows all
    the same, that is found."""
    folder = shutil.copytree(tiny_checkpoint("sdxl"), tmp_path / "checkpoint")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": force_upcast}))
    weights = {name: value.float() for name, value in load_file(folder / VAE).items()}
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        weights[name] = weights[name] * louder
    save_file({name: value.half() for name, value in weights.items()}, folder / VAE)
    made = decoder(folder, tmp_path / "models", Precision.AUTO)
    component = made.variants["original"].components["vae_decoder"]
    assert (component.precision, bool(component.float32_ops)) == (precision, kept)
    assert (float32_values(made, "vae_decoder") != set()) == (kept or precision == "float32")
