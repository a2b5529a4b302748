"""Stable Diffusion XL, its refiner, few-step and distilled models, converted, against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compvis_layout
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.plan import make_plan
from diffusion_runtime import InputError, Pipeline, load_pipeline
from pictures import half_mask, picture
from tiny_checkpoints import EULER_V_ZERO_SNR, LCM

pytestmark = pytest.mark.slow

PARITY_DB, STEPS = 40.0, 4
Load = Callable[[str], Any]
Psnr = Callable[[Any, Any], float]
SIDE = 128
PICTURE, MASK = picture(SIDE), half_mask(SIDE)


def theirs(own: Any, class_name: str) -> Any:
    """diffusers' class of that name on a checkpoint's networks."""
    import diffusers

    pipe = own.diffusers
    extra = {"requires_aesthetics_score": True} if pipe.config.get("requires_aesthetics_score") else {}
    made = getattr(diffusers, class_name)(**pipe.components, **extra)
    if "force_zeros_for_empty_prompt" in pipe.config:
        made.register_to_config(force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt)
    made.set_progress_bar_config(disable=True)
    return made


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


SIZES = {"original_size": (256, 192), "crops_coords_top_left": (8, 16), "target_size": (120, 100)}
NEGATIVE_SIZES = {"negative_original_size": (512, 512), "negative_target_size": (64, 64)}


CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("sdxl", "StableDiffusionXLPipeline", {}),
    ("sdxl", "StableDiffusionXLPipeline", {"negative_prompt": ""}),
    ("sdxl", "StableDiffusionXLPipeline", {"negative_prompt": "red", **SIZES, **NEGATIVE_SIZES}),
    ("sdxl", "StableDiffusionXLPipeline", {"prompt": ["a cat", ""], "negative_prompt": ["", "a horse"]}),
    ("sdxl", "StableDiffusionXLPipeline", {"guidance_scale": 1.0}),
    ("sdxl", "StableDiffusionXLImg2ImgPipeline", {"image": PICTURE}),
    ("sdxl", "StableDiffusionXLInpaintPipeline", {"image": PICTURE, "mask_image": MASK}),
    (
        "sdxl-inpainting",
        "StableDiffusionXLInpaintPipeline",
        {"image": PICTURE, "mask_image": MASK},
    ),
    ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", {"image": PICTURE, "strength": 0.5}),
    (
        "sdxl-refiner",
        "StableDiffusionXLImg2ImgPipeline",
        {
            "image": PICTURE,
            "aesthetic_score": 7.0,
            "negative_aesthetic_score": 1.5,
            "negative_prompt": "red",
        },
    ),
    ("sdxl-v-zero-snr", "StableDiffusionXLPipeline", {}),
    ("sdxl-small", "StableDiffusionXLPipeline", {}),
    ("sdxl-lcm", "StableDiffusionXLPipeline", {"num_inference_steps": 4, "guidance_scale": 8.0}),
    ("sd1-lcm", "LatentConsistencyModelPipeline", {"num_inference_steps": 4}),
    ("sd1-lcm", "LatentConsistencyModelPipeline", {"num_inference_steps": 4, "guidance_scale": 2.0}),
    ("sd1-small", "StableDiffusionPipeline", {}),
    ("sd1-tiny", "StableDiffusionPipeline", {}),
)


@pytest.mark.parametrize(
    ("family", "class_name", "given", "kind"),
    [(*case, ("packages", "compiled")[number % 2]) for number, case in enumerate(CASES)],
)
def test_the_picture_is_diffusers(
    reference: Load,
    converted: Callable[..., Path],
    psnr_db: Psnr,
    family: str,
    class_name: str,
    given: dict[str, Any],
    kind: str,
) -> None:
    """Of packages and of compiled models in turn: `test_every_family` shows that they are the same programs."""
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": STEPS, **given}
    expected = theirs(reference(family), class_name)(**asked, generator=seeded())
    folder = converted(family, compiled=kind == "compiled") / "original" / kind
    made = load_pipeline(folder, "torch")(**asked, generator=seeded())
    for ours, other in zip(made.images, expected.images, strict=True):
        assert psnr_db(np.asarray(ours), np.asarray(other)) >= PARITY_DB


def test_of_latent_consistency_models_the_scheduler_is_left_as_it_is(
    reference: Load, converted: Callable[..., Path], psnr_db: Psnr
) -> None:
    """Their pipeline in diffusers imposes nothing on it, other than StableDiffusionPipeline."""
    import diffusers

    own = {**LCM, "clip_sample": True, "clip_sample_range": 0.5}
    pipe = theirs(reference("sd1-lcm"), "LatentConsistencyModelPipeline")
    pipe.scheduler = diffusers.LCMScheduler.from_config(own)
    pipeline = load_pipeline(converted("sd1-lcm"), "torch")
    pipeline.manifest = pipeline.manifest.model_copy(update={"scheduler": own})
    asked: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2}
    ours, expected = (np.asarray(one(**asked, generator=seeded()).images[0]) for one in (pipeline, pipe))
    assert psnr_db(ours, expected) >= PARITY_DB


def test_a_base_hands_its_latents_over_to_a_refiner(
    reference: Load, converted: Callable[..., Path], psnr_db: Psnr
) -> None:
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 10}
    base, refiner = reference("sdxl"), reference("sdxl-refiner")
    latents = theirs(base, "StableDiffusionXLPipeline")(
        **asked, denoising_end=0.7, output_type="latent", generator=seeded()
    ).images
    expected = theirs(refiner, "StableDiffusionXLImg2ImgPipeline")(
        **asked, image=latents, denoising_start=0.7, generator=seeded()
    )
    first, second = (load_pipeline(converted(family), "torch") for family in ("sdxl", "sdxl-refiner"))
    ours = first(**asked, denoising_end=0.7, output_type="latent", generator=seeded()).images
    assert psnr_db(ours.numpy(), latents.numpy()) >= PARITY_DB
    made = second(**asked, image=ours, denoising_start=0.7, generator=seeded())
    assert psnr_db(np.asarray(made.images[0]), np.asarray(expected.images[0])) >= PARITY_DB


def test_sdxl_is_converted_with_original_attention_unless_asked(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The other kinds' graphs are huge at the sizes that SDXL is for."""
    made = {
        family: convert(
            tiny_checkpoint(family),
            tmp_path / family,
            ConvertOptions(components=("vae_encoder",), compiled=False, verify=False),
        )
        for family in ("sdxl", "sd1")
    }
    assert {family: set(one.variants) for family, one in made.items()} == {
        "sdxl": {"original"},
        "sd1": {"original", "split_einsum_v2"},
    }


@pytest.mark.parametrize("told", [True, False, None])
def test_what_stands_for_no_negative_prompt_is_diffusers_choice(
    told: bool | None, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """None: model_index.json does not say, and zeros stand for it."""
    import diffusers

    folder = shutil.copytree(tiny_checkpoint("sdxl"), tmp_path / "checkpoint")
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    said = {} if told is None else {"force_zeros_for_empty_prompt": told}
    (folder / "model_index.json").write_text(json.dumps({**index, **said}))
    load: Any = diffusers.StableDiffusionXLPipeline
    expected = load.from_pretrained(str(folder), local_files_only=True).config.force_zeros_for_empty_prompt
    options = ConvertOptions("original", components=("vae_encoder",), compiled=False, zip=False, verify=False)
    made = convert(folder, tmp_path / "models", options)
    assert made.variants["original"].force_zeros_for_empty_prompt == expected
    path = compvis_layout.write(folder, tmp_path / "model.safetensors")
    save_file({name: value for name, value in load_file(path).items() if name.startswith("model.")}, path)
    alone = open_checkpoint(str(path), ConvertOptions(base=str(folder)))
    assert alone.pipeline_config == open_checkpoint(str(folder)).pipeline_config


def test_what_cannot_be_is_said(converted: Callable[..., Path]) -> None:
    pipeline: Pipeline = load_pipeline(converted("sdxl"), "torch")
    failing: tuple[tuple[dict[str, Any], str], ...] = (
        ({"denoising_start": 0.5}, "needs the latents"),
        ({"denoising_end": 1.5}, "more than 0 and less than 1"),
        ({"original_size": (1, 2, 3)}, "expected two whole numbers"),
        ({"aesthetic_score": float("nan")}, "expected a number"),
        ({"denoising_end": 0.01, "num_inference_steps": 2}, "use more steps"),
    )
    for given, message in failing:
        with pytest.raises(InputError, match=message):
            pipeline("a cat", **given)


@pytest.mark.parametrize("family", ["sd1-lcm", "sdxl-lcm", "sd1"])
def test_a_unet_that_takes_the_scale_has_one_row(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Nothing is computed without the prompt, so a second row would be work for nothing."""
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    usual, asked = (make_plan(checkpoint, ConvertOptions("original", batch_size=size)) for size in (None, 2))
    assert (usual.shape.batch_size, asked.shape.batch_size) == (1 if family.endswith("lcm") else 2, 2)


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
def test_schedulers_of_few_steps(scheduler: str, reference: Load, psnr_db: Psnr) -> None:
    """As LCM and TCD LoRAs are used; eta is TCD's gamma."""
    import diffusers

    own = reference("sd1")
    asked: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 1.5, "eta": 0.3}
    pipe = diffusers.StableDiffusionPipeline(**{**own.diffusers.components, "safety_checker": None})
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    expected = pipe(**asked, output_type="latent", generator=seeded()).images
    ours = own.pipeline(scheduler=scheduler.removesuffix("Scheduler").lower())
    made = ours(**asked, output_type="latent", generator=seeded()).images
    assert psnr_db(made.numpy(), expected.numpy()) >= PARITY_DB
    plain = ours(**{**asked, "eta": 0.0}, output_type="latent", generator=seeded()).images
    assert torch.equal(plain, made) == (scheduler == "LCMScheduler")


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),  # Turbo
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # Lightning
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "sample"}),  # in one step
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),  # Hyper
    ],
)
def test_models_of_few_steps(
    scheduler: str, settings: dict[str, Any], reference: Load, converted: Callable[..., Path], psnr_db: Psnr
) -> None:
    """As their cards say: with LCM's and TCD's schedulers, and with trailing timesteps."""
    import diffusers

    config = {**reference("sdxl").diffusers.scheduler.config, **settings}
    pipe = theirs(reference("sdxl"), "StableDiffusionXLPipeline")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    ours = with_scheduler(load_pipeline(converted("sdxl"), "torch"), {**config, "_class_name": scheduler})
    for given in ({"num_inference_steps": 1, "guidance_scale": 0.0}, {"num_inference_steps": 4}):
        asked: dict[str, Any] = {"prompt": "a cat", "guidance_scale": 1.5, "eta": 0.3, **given}
        expected = pipe(**asked, generator=seeded()).images[0]
        made = ours(**asked, generator=seeded()).images[0]
        assert psnr_db(np.asarray(made), np.asarray(expected)) >= PARITY_DB


def with_scheduler(pipeline: Pipeline, config: dict[str, Any]) -> Pipeline:
    """As if the checkpoint had been converted with this scheduler."""
    told = {"scheduler": config, "prediction_type": config["prediction_type"]}
    made = pipeline.manifest.model_copy(update=told)
    return Pipeline(made, pipeline.models, pipeline.tokenizer, tokenizer_2=pipeline.tokenizer_2)


@pytest.mark.parametrize("maker", ["NoobAI", "Pony"])
def test_a_single_file_draws_as_its_users_have_diffusers_draw(
    maker: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, psnr_db: Psnr
) -> None:
    """NoobAI's marks say what its users set in diffusers. Pony's ask for clip skip 2, in a yaml here, which is what
    SDXL takes anyway."""
    import diffusers

    path = compvis_layout.write(tiny_checkpoint("sdxl"), tmp_path / "model.safetensors")
    if maker == "NoobAI":
        save_file({**load_file(path), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    else:
        path.with_suffix(".yaml").write_text(CLIP_SKIP_2)
    options = ConvertOptions("original", compiled=False, zip=False, verify=False, height=SIDE, width=SIDE)
    convert(path, tmp_path / "models", options)
    load: Any = diffusers.StableDiffusionXLPipeline
    pipe = load.from_single_file(
        str(path), config=str(tiny_checkpoint("sdxl")), local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    if maker == "NoobAI":
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
            pipe.scheduler.config,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": STEPS}
    ours = load_pipeline(tmp_path / "models", "torch")(**asked, generator=seeded()).images[0]
    expected = pipe(**asked, height=SIDE, width=SIDE, generator=seeded()).images[0]
    assert psnr_db(np.asarray(ours), np.asarray(expected)) >= PARITY_DB


CLIP_SKIP_2 = """
model:
  params:
    scale_factor: 0.13025
    network_config: {params: {model_channels: 32, channel_mult: [1, 2, 2], num_head_channels: 16}}
    conditioner_config:
      params:
        emb_models:
          - {input_key: txt, params: {layer: hidden, layer_idx: -2}}
          - {input_key: txt, params: {layer: penultimate, always_return_pooled: true}}
"""


@pytest.fixture(scope="module")
def at_6_bits(build_once: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    def folder(family: str) -> Path:
        options = ConvertOptions("original", nbits=6, zip=False, verify=False)
        return (
            build_once(f"6-bits-{family}", lambda to: convert(tiny_checkpoint(family), to / "models", options))
            / "models"
        )

    return folder


@pytest.mark.parametrize(
    ("family", "class_name", "given"),
    [
        ("sdxl", "StableDiffusionXLPipeline", {}),
        # Its first step is the picture itself: guidance would show what 6 bits lose.
        ("sdxl-v-zero-snr", "StableDiffusionXLPipeline", {"guidance_scale": 1.0}),
        ("sdxl-inpainting", "StableDiffusionXLInpaintPipeline", {"image": PICTURE, "mask_image": MASK}),
        ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", {"image": PICTURE, "strength": 0.5}),
        ("sdxl-small", "StableDiffusionXLPipeline", {}),
        ("sd1-lcm", "LatentConsistencyModelPipeline", {"num_inference_steps": 4}),
        ("sd1-tiny", "StableDiffusionPipeline", {}),
    ],
)
def test_at_6_bits_the_picture_is_diffusers(
    family: str,
    class_name: str,
    given: dict[str, Any],
    reference: Load,
    at_6_bits: Callable[[str], Path],
    psnr_db: Psnr,
) -> None:
    """Compiled models of 6 bits. Those for v-prediction have SDXL's weights."""
    asked: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 8, **given}
    expected = theirs(reference(family), class_name)(**asked, generator=seeded()).images[0]
    with_v = family == "sdxl-v-zero-snr"
    ours = load_pipeline(at_6_bits("sdxl" if with_v else family) / "original" / "compiled", "torch")
    ours = with_scheduler(ours, dict(EULER_V_ZERO_SNR)) if with_v else ours
    made = ours(**asked, generator=seeded()).images[0]
    assert psnr_db(np.asarray(made), np.asarray(expected)) >= PARITY_DB
