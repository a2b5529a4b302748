"""TAESD (diffusers' AutoencoderTiny) as the VAE and for previews: the pictures are those of diffusers with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_runtime import Pipeline, load_pipeline
from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import CheckpointError, InputError
from pictures import half_mask, picture

pytestmark = pytest.mark.usefixtures("loaded_once")

PARITY_DB = 40.0
WIDTHS = {"encoder_block_out_channels": [16] * 4, "decoder_block_out_channels": [16] * 4}
HALVES = {"encoder": 0, "decoder": 1}
"""How many layers more the published halves have at the beginning."""


def taesd(seed: int) -> Any:
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderTiny(**WIDTHS).eval()


def published(vae: Any, folder: Path) -> Path:
    """As madebyollin/taesd has it besides diffusers' folder: a decoder and an encoder in a file each."""
    folder.mkdir()
    for part, more in HALVES.items():
        tensors = {}
        for name, value in getattr(vae, part).layers.state_dict().items():
            number, _, rest = name.partition(".")
            tensors[f"{int(number) + more}.{rest}"] = value
        save_file(tensors, folder / f"taesd_{part}.safetensors")
    return folder / "taesd_decoder.safetensors"


@pytest.fixture(scope="module")
def vaes() -> Mapping[str, Any]:
    return {"vae": taesd(1), "preview_vae": taesd(2)}


@pytest.fixture(scope="module")
def sources(vaes: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("taesd")
    vaes["vae"].save_pretrained(place / "folder")
    return {"vae": place / "folder", "preview_vae": published(vaes["preview_vae"], place / "halves")}


@pytest.fixture(scope="module")
def models(
    tiny_checkpoint: Callable[[str], Path], sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("models") / "models"
    convert(tiny_checkpoint("sd1"), output, ConvertOptions("original", zip=False, **sources))  # type: ignore[arg-type]
    return output


def psnr_db(got: np.ndarray, expected: np.ndarray, peak: float = 1.0) -> float:
    error = float(np.mean((got.astype(np.float64) - expected) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


def worst_db(ours: Pipeline, source: Path, vae: Any, class_name: str, **given: Any) -> float:
    import diffusers

    kind = getattr(diffusers, class_name)
    pipe = kind.from_pretrained(str(source), local_files_only=True, dtype=torch.float32, vae=vae)
    if hasattr(pipe, "safety_checker"):
        pipe.register_modules(safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, "output_type": "np", **given}
    expected = pipe(**asked, generator=torch.Generator().manual_seed(3)).images[0]
    return psnr_db(ours(**asked, generator=torch.Generator().manual_seed(3)).images[0], expected)


@pytest.mark.parametrize("kind", ["packages", "compiled"])
def test_the_pictures_are_diffusers(
    tiny_checkpoint: Callable[[str], Path], vaes: Mapping[str, Any], models: Path, kind: str
) -> None:
    """Its encoder gives latents, for which nothing is drawn: the noise after that is diffusers', too."""
    ours = load_pipeline(models / "original" / kind, "torch", check_safety=False)
    one = (ours, tiny_checkpoint("sd1"), vaes["vae"])
    from_picture: dict[str, Any] = {"image": picture(64), "strength": 0.7}
    assert worst_db(*one, "StableDiffusionPipeline") >= PARITY_DB
    assert worst_db(*one, "StableDiffusionImg2ImgPipeline", **from_picture) >= PARITY_DB
    assert worst_db(*one, "StableDiffusionInpaintPipeline", mask_image=half_mask(), **from_picture) >= PARITY_DB


def test_components_and_what_apps_have_fixed(vaes: Mapping[str, Any], models: Path) -> None:
    made = manifest.read(models / "original" / "packages")
    for name in ("vae_decoder", "vae_encoder", "preview_vae_decoder"):
        assert min(made.components[name].psnr_db.values()) >= table()[name].min_psnr_db >= 60
    assert (models / "original" / "compiled" / "PreviewVAEDecoder.mlmodelc").is_dir()
    assert made.latents.scale == 0.18215 and not made.latents.drawn
    assert made.folded.latents is not None and made.folded.latents.scale == 1.0
    encoder = load_pipeline(models, "torch").models["vae_encoder"]
    x = (np.asarray(picture(64), np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    latents, log_variance = np.split(encoder.one("latent", x=x.astype(np.float16)), 2, axis=1)
    with torch.no_grad():
        own = vaes["vae"].encode(torch.from_numpy(x)).latents.numpy()
    assert psnr_db(latents * 0.18215, own, float(np.abs(own).max())) >= 60  # as apps multiply them
    assert np.exp(0.5 * log_variance).max() * 0.18215 < 1e-3, "what apps draw is nothing to see"


def test_previews_use_their_own_decoder(vaes: Mapping[str, Any], models: Path) -> None:
    ours = load_pipeline(models, "torch", check_safety=False)
    steps = list[Any]()
    ours("a cat", num_inference_steps=2, seed=1, output_type="latent", on_step=steps.append)
    shown = ours.preview(steps[0])
    with torch.no_grad():
        expected = vaes["preview_vae"].decode(steps[0].preview()).sample[0]
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert psnr_db(np.asarray(shown) / 255.0, expected) >= PARITY_DB
    assert ours.models.timings["preview_vae_decoder"].calls == 1
    assert "vae_decoder" not in ours.models.timings, "the whole decoder is not even loaded"


def test_sdxl_draws_with_it(
    tiny_checkpoint: Callable[[str], Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    source, vae = tiny_checkpoint("sdxl"), sources["preview_vae"]
    options = ConvertOptions("original", vae=vae, verify=False, compiled=False)
    convert(source, tmp_path / "models", options)
    ours = load_pipeline(tmp_path / "models", "torch")
    assert ours.manifest.latents.scale == 0.13025
    assert worst_db(ours, source, taesd(2), "StableDiffusionXLPipeline") >= PARITY_DB


def test_comfyui_has_no_decoder_for_previews(
    tiny_checkpoint: Callable[[str], Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    options = ConvertOptions("original", preview_vae=sources["vae"], layout="comfyui")
    with pytest.raises(InputError, match="--preview-vae: models for --layout comfyui have none"):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no encoder", r"taesd_encoder\.safetensors, which belongs to it, is not beside it"),
        ("no name", "half of a TAESD, but its name says neither encoder nor decoder"),
        ("a layer is missing", r"missing: decoder\.layers\.18\.weight"),
    ],
)
def test_what_is_not_whole_is_refused(
    tiny_checkpoint: Callable[[str], Path], vaes: Mapping[str, Any], tmp_path: Path, change: str, message: str
) -> None:
    file = published(vaes["vae"], tmp_path / "halves")
    if change == "no encoder":
        file.with_name("taesd_encoder.safetensors").unlink()
    if change == "no name":
        file = file.rename(file.with_name("half.safetensors"))
    if change == "a layer is missing":
        from safetensors.torch import load_file

        save_file({name: value for name, value in load_file(file).items() if name != "19.weight"}, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(preview_vae=str(file)))
    assert str(caught.value).startswith("--preview-vae") and "\n" not in str(caught.value)
