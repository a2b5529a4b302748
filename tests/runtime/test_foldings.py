"""What apps have fixed, put into the models: a small client with everything fixed draws diffusers' pictures, and
our own pipelines draw the same ones whatever was folded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_convert import convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.inspect import inspect
from diffusion_convert.inspect.show import as_text
from diffusion_convert.options import ConvertOptions
from diffusion_convert.verification.folder import verify_models
from diffusion_runtime import load_pipeline, schedulers
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.bundle import manifest
from diffusion_runtime.diffusers import load_diffusers_pipeline
from diffusion_runtime.folding import Folding
from diffusion_runtime.prompt import tokenizer

PROMPT, STEPS, SEED = "a photo of a red cat", 10, 3
PARITY_DB, WRONG_DB = 40.0, 35.0
SCALE = 0.7295
Psnr = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Converted:
    """A checkpoint that differs from what apps have fixed, folded and as it is, and diffusers' pipeline for it."""

    source: Path
    folded: Path
    own: Path
    theirs: Any

    def expected(self, scheduler: str) -> np.ndarray:
        self.theirs.scheduler = self.scheduler(scheduler)
        return picture(self.theirs)

    def scheduler(self, name: str | None = None) -> Any:
        config = json.loads((self.source / "scheduler" / "scheduler_config.json").read_text())
        return schedulers.build(config, name)


def picture(pipe: Any, **given: Any) -> np.ndarray:
    asked = {"num_inference_steps": STEPS, "guidance_scale": 7.5, **given}
    return np.asarray(pipe(PROMPT, generator=torch.manual_seed(SEED), **asked).images[0])


def write(family: str, folder: Path, **vae: Any) -> Path:
    """A tiny checkpoint of that family whose VAE's configuration says ``vae``."""
    import tiny_checkpoints

    tiny_checkpoints.build(family, folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **vae}))
    return folder


def load(source: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(source), local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Stable Diffusion 2 768-v with another latent scale: it has all three properties."""
    folder = tmp_path_factory.mktemp("sd2")
    source = write("sd2-v", folder / "checkpoint", scaling_factor=SCALE)
    for name, options in (
        ("folded", ConvertOptions("original", fold="prediction", compiled=False)),
        ("own", ConvertOptions("original", no_fold=("latent-scale", "padding"), compiled=False, verify=False)),
    ):
        convert(source, folder / name, options)
    return Converted(source, folder / "folded", folder / "own", load(source))


def client(folder: Path, unfolded: str = "", own: Path | None = None) -> np.ndarray:
    """A picture as Apple's Swift pipeline and what is built on it draw it: prompts padded with <|endoftext|>, the
    UNet's output taken for noise, latents divided by 0.18215. ``unfolded``: the component that is ``own``'s."""
    backend = TorchBackend()

    def model(name: str) -> Callable[..., dict[str, np.ndarray]]:
        place = own if own is not None and name == unfolded else folder
        (path,) = (place / "original" / "packages").glob(f"*_{name}.mlpackage")
        return backend.load(path)

    clip = tokenizer.load(folder / "original" / "packages").clip
    end, encode = clip.convert_tokens_to_ids("<|endoftext|>"), model("text_encoder")

    def states(text: str) -> np.ndarray:
        ids = clip(text)["input_ids"]
        padded = np.array([[*ids, *[end] * (77 - len(ids))]], np.float32)
        return encode(input_ids=padded)["last_hidden_state"].transpose(0, 2, 1)[:, :, None]

    both = np.concatenate([states(""), states(PROMPT)]).astype(np.float16)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(STEPS)
    unet = model("unet")
    latents = torch.randn(1, 4, 12, 12, generator=torch.manual_seed(SEED))
    for t in scheduler.timesteps:
        sample = torch.cat([latents] * 2).numpy().astype(np.float16)
        time = np.full(2, float(t), np.float16)
        found = unet(sample=sample, timestep=time, encoder_hidden_states=both)["noise_pred"]
        without, with_text = torch.from_numpy(found).float().chunk(2)
        latents = scheduler.step(without + 7.5 * (with_text - without), t, latents).prev_sample
    image = model("vae_decoder")(z=(latents / 0.18215).numpy().astype(np.float16))["image"]
    shown: np.ndarray = ((image[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
    return shown


def test_a_client_with_everything_fixed_draws_diffusers_picture(sd2: Converted, psnr_db: Psnr) -> None:
    assert psnr_db(client(sd2.folded), sd2.expected("ddim")) >= PARITY_DB


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_it_does_not_without_a_folding(sd2: Converted, psnr_db: Psnr, component: str) -> None:
    """The padding, the prediction and the latent scale."""
    assert psnr_db(client(sd2.folded, component, sd2.own), sd2.expected("ddim")) < WRONG_DB


@pytest.mark.parametrize("scheduler", [name for name in schedulers.SCHEDULERS if name != "pndm"])
def test_our_pipeline_draws_diffusers_picture(sd2: Converted, psnr_db: Psnr, scheduler: str) -> None:
    ours = picture(load_pipeline(sd2.folded, "torch", scheduler=scheduler))
    assert psnr_db(ours, sd2.expected(scheduler)) >= PARITY_DB


@pytest.mark.parametrize("models", ["folded", "own"])
def test_it_draws_the_same_whatever_was_folded(sd2: Converted, psnr_db: Psnr, models: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96))
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**sd2.theirs.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = sd2.scheduler()
    expected = picture(theirs, image=image, strength=0.6)
    folder = getattr(sd2, models)
    assert psnr_db(picture(load_pipeline(folder, "torch"), image=image, strength=0.6), expected) >= PARITY_DB
    inside = load_diffusers_pipeline(folder, "image-to-image", "torch")
    assert psnr_db(picture(inside, image=image, strength=0.6), expected) >= PARITY_DB


def test_pndm_is_why_predictions_are_not_folded_by_default(sd2: Converted, psnr_db: Psnr) -> None:
    """It mixes several steps' predictions as they are: where those are noise, it draws another picture."""
    assert not Folding.PREDICTION.about.by_default
    assert psnr_db(picture(load_pipeline(sd2.folded, "torch", scheduler="pndm")), sd2.expected("pndm")) < PARITY_DB
    assert psnr_db(picture(load_pipeline(sd2.own, "torch", scheduler="pndm")), sd2.expected("pndm")) >= PARITY_DB


def test_the_manifest_tells_the_checkpoints_own(sd2: Converted) -> None:
    folded, own = (manifest.read(folder / "original" / "packages") for folder in (sd2.folded, sd2.own))
    assert folded.folded.names == tuple(Folding)
    assert (folded.latents.scale, folded.prediction_type, folded.scheduler["prediction_type"]) == (
        0.18215,
        "epsilon",
        "epsilon",
    )
    assert folded.folded.latents is not None
    assert folded.folded.latents.scale == SCALE
    assert (folded.folded.padding, folded.folded.prediction_type) == ({"text_encoder": 0}, "v_prediction")
    assert own.folded.names == ()
    assert (own.latents.scale, own.prediction_type) == (SCALE, "v_prediction")
    shown = as_text(inspect(sd2.folded / "original" / "packages"))
    assert all(f"  folded    {folding.value}: " in shown for folding in Folding)
    assert "folded" not in as_text(inspect(sd2.own / "original" / "packages"))


def test_verify_compares_with_the_folded_network(sd2: Converted) -> None:
    """A manifest that hides what was folded is found out."""
    checkpoint = open_checkpoint(str(sd2.source))
    packages = sd2.folded / "original" / "packages"
    assert all(one.holds for one in verify_models(packages, checkpoint, lambda _: None))
    made = manifest.read(packages)
    manifest.write(made.model_copy(update={"folded": manifest.Folded()}), packages)
    try:
        wrong = {one.component for one in verify_models(packages, checkpoint, lambda _: None) if not one.holds}
    finally:
        manifest.write(made, packages)
    assert wrong == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


def test_latents_of_a_mean_and_deviation(tmp_path: Path, psnr_db: Psnr) -> None:
    """They are SDXL's alone, and have no place in the manifest: they are folded whatever is asked."""
    own = {"latents_mean": [0.5, -0.4, 0.2, 1.0], "latents_std": [2.0, 3.0, 1.5, 0.7], "scaling_factor": 0.5}
    source = write("sdxl", tmp_path / "checkpoint", **own)
    expected = picture(load(source))
    for name, kept in (("folded", ()), ("own", ("latent-scale",))):
        convert(source, tmp_path / name, ConvertOptions("original", no_fold=kept, compiled=False, verify=False))
        assert psnr_db(picture(load_pipeline(tmp_path / name, "torch")), expected) >= PARITY_DB
