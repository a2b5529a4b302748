"""T2I-Adapters: converted, and pictures as diffusers' adapter pipelines draw them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny_adapters
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.cli.main import app
from diffusion_runtime import DiffusionError, InputError, load_pipeline
from diffusion_runtime.bundle import manifest

pytestmark = pytest.mark.slow

COMPONENT_DB, PARITY_DB = 60.0, 40.0
FULL, LIGHT, XL = "t2iadapter_canny", "t2iadapter_color", "t2i-adapter-lineart-sdxl"
PARTS = ("text_encoder", "unet", "vae_decoder", f"T2IAdapter_{FULL}", f"T2IAdapter_{LIGHT}")
ASKED: dict[str, Any] = {"prompt": "a photo of a cat", "negative_prompt": "red", "num_inference_steps": 4}
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).resize(
        (64, 64), Image.Resampling.NEAREST
    )
    for seed in range(2)
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"adapter_image": PICTURES[0]}, "name the T2I-Adapter of each picture"),
    ({"adapter_image": PICTURES, "adapter": ["canny", "canny"]}, "has two pictures"),
    ({"adapter_image": PICTURES, "adapter_conditioning_scale": [1.0]}, "expected one of each"),
    ({"adapter_image": PICTURES[0], "adapter": "depth"}, "none of these models' T2I-Adapters"),
    ({"adapter_image": PICTURES[0], "adapter": "canny", "adapter_conditioning_factor": 2.0}, "part of the steps"),
    ({"adapter_conditioning_scale": 0.5}, "there is no adapter_image"),
]
SHAPES = ("channels", "downscale_factor", "in_channels", "num_res_blocks")
Psnr = Callable[[Any, Any], float]


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


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def arrays(made: Any) -> np.ndarray:
    return np.asarray(made.images[0])


def theirs(class_name: str, checkpoint: Path, *adapters: Path) -> Any:
    """diffusers' adapter pipeline."""
    import diffusers

    loaded = [diffusers.T2IAdapter.from_pretrained(str(one)) for one in adapters]
    pipe = getattr(diffusers, class_name).from_pretrained(
        str(checkpoint), adapter=loaded if len(loaded) > 1 else loaded[0]
    )
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    return pipe


def test_pictures_of_one_and_two_are_diffusers(
    sd1: Path, adapters: Path, tiny_checkpoint: Callable[[str], Path], psnr_db: Psnr
) -> None:
    source = tiny_checkpoint("sd1-tiny")
    ours = load_pipeline(sd1 / "original" / "packages", "torch")
    one = theirs("StableDiffusionAdapterPipeline", source, adapters / FULL)
    expected = arrays(one(**ASKED, image=PICTURES[0], adapter_conditioning_scale=0.8, generator=seeded()))
    made = ours(
        **ASKED,
        adapter_image=PICTURES[0],
        adapter="canny",
        adapter_conditioning_scale=0.8,
        num_images_per_prompt=2,
        generator=[seeded(), seeded()],
    )
    assert all(psnr_db(np.asarray(image), expected) >= PARITY_DB for image in made.images)
    assert psnr_db(arrays(ours(**ASKED, generator=seeded())), expected) < 30  # without, as if there were no adapter
    both = theirs("StableDiffusionAdapterPipeline", source, adapters / FULL, adapters / LIGHT)
    given = [PICTURES[0], PICTURES[1].convert("L")]
    expected = arrays(both(**ASKED, image=given, adapter_conditioning_scale=[0.9, 0.5], generator=seeded()))
    made = ours(**ASKED, adapter_image=PICTURES, adapter_conditioning_scale=[0.9, 0.5], generator=seeded())
    assert psnr_db(arrays(made), expected) >= PARITY_DB
    for arguments, why in WRONG:
        with pytest.raises(InputError, match=why):
            ours("a cat", **arguments)


@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_sdxl_at_6_bits_compiled_is_diffusers(
    factor: float, sdxl: Path, adapters: Path, tiny_checkpoint: Callable[[str], Path], psnr_db: Psnr
) -> None:
    picture = PICTURES[0].resize((128, 128), Image.Resampling.NEAREST)
    pipe = theirs("StableDiffusionXLAdapterPipeline", tiny_checkpoint("sdxl"), adapters / XL)
    asked: dict[str, Any] = {**ASKED, "num_inference_steps": 8, "adapter_conditioning_factor": factor}
    expected = arrays(pipe(**asked, image=picture, adapter_conditioning_scale=4.0, generator=seeded()))
    ours = load_pipeline(sdxl / "original" / "compiled", "torch")
    made = ours(**asked, adapter_image=picture, adapter_conditioning_scale=4.0, generator=seeded())
    assert psnr_db(arrays(made), expected) >= PARITY_DB
    other = {**asked, "adapter_conditioning_factor": 1.125 - factor}
    made = ours(**other, adapter_image=picture, adapter_conditioning_scale=4.0, generator=seeded())
    assert psnr_db(arrays(made), expected) < 38  # the factor counts


def test_generate_and_its_record(sd1: Path, tmp_path: Path, psnr_db: Psnr) -> None:
    given, made, again = tmp_path / "edges.png", tmp_path / "made.png", tmp_path / "again.png"
    PICTURES[0].save(given)
    models, run = str(sd1 / "original" / "packages"), CliRunner().invoke
    asked = ["generate", models, "--prompt", "a cat", "--steps", "3", "--seed", "1"]
    told = run(app, [*asked, "--adapter", f"canny={given}:0.8:0.5", "-o", str(made)])
    assert told.exit_code == 0, told.output
    (recorded,) = json.loads(Image.open(made).text["coreml-sd"])["adapters"]  # type: ignore[attr-defined]
    assert (recorded["name"], recorded["scale"], recorded["end"]) == (FULL, 0.8, 0.5)
    told = run(app, ["generate", models, "--from", str(made), "-o", str(again)])
    assert told.exit_code == 0, told.output
    assert psnr_db(np.asarray(Image.open(again)), np.asarray(Image.open(made))) == float("inf")
    for text, why in (("canny", "expected NAME=PICTURE"), (f"depth={given}", "none of these models' T2I-Adapters")):
        wrong = run(app, [*asked, "--adapter", text, "-o", str(again)])
        assert isinstance(wrong.exception, InputError) and why in str(wrong.exception)


def tencents(name: str, layers: int) -> str:
    """A tensor's name as TencentARC publishes it: full adapters count the layers of all blocks through."""
    name = name.removeprefix("adapter.")
    if not layers:
        return name.replace(".resnets.", ".body.")
    name = re.sub(r"body\.(\d+)\.resnets\.(\d+)", lambda at: f"body.{int(at[1]) * layers + int(at[2])}", name)
    return re.sub(r"body\.(\d+)\.in_conv", lambda at: f"body.{int(at[1]) * layers}.in_conv", name)


@pytest.mark.parametrize(("folder", "layers"), [(FULL, 1), (FULL, 2), (LIGHT, 0), (XL, 1)])
def test_a_file_is_what_the_folder_is(
    folder: str, layers: int, adapters: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """By TencentARC's names, pickled, and by diffusers'."""
    source, family = adapters / folder, "sdxl" if folder == XL else "sd1-tiny"
    if layers > 1:
        channels = json.loads((source / "config.json").read_text())["channels"]
        source = tiny_adapters.write_t2i_adapter(tmp_path / folder, channels, layers=layers)
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "own.safetensors")
    torch.save({tencents(name, layers): value for name, value in tensors.items()}, tmp_path / "tencents.pth")
    files = [str(tmp_path / name) for name in ("tencents.pth", "own.safetensors")]
    found = open_checkpoint(str(tiny_checkpoint(family)), ConvertOptions(t2i_adapters=[*files, str(source)]))
    assert list(found.t2i_adapters) == ["tencents", "own", folder]
    expected = found.models[f"T2IAdapter_{folder}"]
    for name in ("tencents", "own"):
        network = found.models[f"T2IAdapter_{name}"]
        assert {key: network.config[key] for key in (*SHAPES, "adapter_type")} == {
            key: expected.config[key] for key in (*SHAPES, "adapter_type")
        }
        tensors, wanted = network.tensors(), expected.tensors()
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], value) for key, value in wanted.items())


def refused(checkpoint: Path, *sources: Path) -> str:
    with pytest.raises(DiffusionError) as error:
        open_checkpoint(str(checkpoint), ConvertOptions(t2i_adapters=[str(one) for one in sources]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused(adapters: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    sd1, sdxl = tiny_checkpoint("sd1-tiny"), tiny_checkpoint("sdxl")
    said = refused(sdxl, adapters / FULL)
    assert "it gives features of 32x64x64, 64x32x32, 64x16x16, expected 32x32x32, 64x32x32" in said
    assert "no such file or folder" in refused(sd1, tmp_path / "nowhere")
    assert "is of class UNet2DConditionModel: expected T2IAdapter" in refused(sd1, sd1 / "unet")
    assert "is given twice" in refused(sd1, adapters / FULL, adapters / FULL)
    save_file({"body.0.other": torch.ones(1)}, tmp_path / "other.safetensors")
    assert "no T2I-Adapter: it lacks 'adapter.body.0.in_conv.weight'" in refused(
        sd1, tmp_path / "other.safetensors"
    )
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"height": 136, "width": 128}, "takes multiples of 16"),
        ({"layout": "comfyui"}, "comfyui and --t2i-adapter"),
    ]
    for options, why in wrong:
        with pytest.raises(InputError, match=why):
            convert(sdxl, tmp_path / "out", ConvertOptions(t2i_adapters=adapters / XL, **options))
