"""T2I-Adapters: converted, and pictures as diffusers' adapter pipelines draw them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny_adapters
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.cli.main import app
from diffusion_runtime import DiffusionError, InputError
from diffusion_runtime.bundle import manifest

pytestmark = pytest.mark.slow

COMPONENT_DB = 60.0
FULL, LIGHT, XL = "t2iadapter_canny", "t2iadapter_color", "t2i-adapter-lineart-sdxl"
PARTS = ("text_encoder", "unet", "vae_decoder", f"T2IAdapter_{FULL}", f"T2IAdapter_{LIGHT}")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full and a light one for sd1-tiny, whose down blocks all have attention, and one for sdxl, whose first has
    none and whose last feature goes to the middle."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_adapters.write_t2i_adapter(folder / FULL, [32, 64, 64])
    tiny_adapters.write_t2i_adapter(folder / LIGHT, [32, 64], "light_adapter", 1)
    tiny_adapters.write_t2i_adapter(folder / XL, [32, 64, 64, 64], "full_adapter_xl", 2)
    return folder


@pytest.fixture(scope="module")
def sd1(adapters: Path, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both adapters; weights have placeholders, as if they were large."""
    from diffusion_convert.export import placeholders

    folder = tmp_path_factory.mktemp("sd1") / "models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placeholders, "MIN_SIZE", 64)
        given = f"{adapters / FULL},{adapters / LIGHT}"
        options = ConvertOptions("original", components=PARTS, t2i_adapters=given, compiled=False)
        convert(tiny_checkpoint("sd1-tiny"), folder, options)
    return folder


@pytest.fixture(scope="module")
def sdxl(adapters: Path, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 6 bits, compiled, and zipped."""
    folder = tmp_path_factory.mktemp("sdxl") / "models"
    options = ConvertOptions(nbits=6, t2i_adapters=adapters / XL, verify=False)
    convert(tiny_checkpoint("sdxl"), folder, options)
    return folder


def test_components_are_at_parity(sd1: Path) -> None:
    made = manifest.read(sd1 / "original" / "packages")
    assert set(made.components) == set(PARTS)
    assert min(min(one.psnr_db.values()) for one in made.components.values()) >= COMPONENT_DB
    assert list(made.t2i_adapters) == [FULL, LIGHT]
    features = {"adapter_state_0": (32, 8, 8), "adapter_state_1": (64, 4, 4), "adapter_state_2": (64, 2, 2)}
    for name, rows in (("unet", 2), (f"T2IAdapter_{LIGHT}", 1)):
        ports = made.components[name].inputs if rows == 2 else made.components[name].outputs
        found = {one.name: one.shape for one in ports if one.name in features}
        assert found == {port: (rows, *shape) for port, shape in features.items()}
    assert made.components[f"T2IAdapter_{LIGHT}"].inputs[0].shape == (1, 1, 64, 64)


def test_bundle_card_and_verify(
    sdxl: Path, sd1: Path, adapters: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    compiled = sdxl / "original" / "compiled"
    made = manifest.read(compiled)
    assert made.components[f"T2IAdapter_{XL}"].files == ("adapters/T2IAdapterLineartSdxl.mlmodelc",)
    assert made.components[f"T2IAdapter_{XL}"].palettization is not None
    card = (sdxl / "README.md").read_text(encoding="utf-8")
    assert f"the T2I-Adapter `{XL}`, which apps do not use" in card
    assert f"--adapter {XL}=" in card
    run, source = CliRunner().invoke, str(tiny_checkpoint("sd1-tiny"))
    given = ",".join(str(adapters / name) for name in (FULL, LIGHT))
    told = run(app, ["verify", str(sd1 / "original"), "--against", source, "--t2i-adapter", given])
    assert told.exit_code == 0, told.output
    assert f" T2IAdapter_{LIGHT} " in told.output
    inspected = json.loads(run(app, ["inspect", str(sd1 / "original"), "--json"]).stdout)
    assert list(inspected[0]["manifest"]["t2i_adapters"]) == [FULL, LIGHT]


def refused(checkpoint: Path, *sources: Path) -> str:
    with pytest.raises(DiffusionError) as error:
        open_checkpoint(str(checkpoint), t2i_adapters=[str(one) for one in sources])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused(adapters: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    sd1, sdxl = tiny_checkpoint("sd1-tiny"), tiny_checkpoint("sdxl")
    said = refused(sdxl, adapters / FULL)
    assert "it gives features of 32x64x64, 64x32x32, 64x16x16, expected 32x32x32, 64x32x32" in said
    assert "no such file or folder" in refused(sd1, tmp_path / "nowhere")
    assert "is of class UNet2DConditionModel: expected T2IAdapter" in refused(sd1, sd1 / "unet")
    assert "would have the same file name" in refused(sd1, adapters / FULL, adapters / FULL)
    assert "is a file" in refused(sd1, adapters / FULL / "config.json")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"height": 136, "width": 128}, "takes multiples of 16"),
        ({"layout": "comfyui"}, "comfyui and --t2i-adapter"),
    ]
    for options, why in wrong:
        with pytest.raises(InputError, match=why):
            convert(sdxl, tmp_path / "out", ConvertOptions(t2i_adapters=adapters / XL, **options))
