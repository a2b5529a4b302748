"""What diffusers' pipeline classes impose on schedulers, against these classes loaded from folders as users do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_runtime import denoising, schedulers
from diffusion_runtime.errors import InputError
from diffusion_runtime.pipeline import Pipeline
from pictures import picture

pytestmark = [
    pytest.mark.usefixtures("dpm2_made_at_once"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers says what it imposes
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]
PARITY_DB = 40.0
Load = Callable[[str], Any]
Psnr = Callable[[Any, Any], float]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "missing": BETAS,
    "of 2022": {
        **BETAS,
        "_diffusers_version": "0.2.4",
        "tensor_format": "pt",
        "timestep_values": None,
        "clip_sample": True,
        "steps_offset": 0,
        "skip_prk_steps": False,
    },
    "contradictory": {**BETAS, "clip_sample": True, "steps_offset": 7, "skip_prk_steps": False},
    "as published": {**BETAS, "clip_sample": False, "steps_offset": 1, "skip_prk_steps": True},
}
CLASSES = sorted({recipe.class_name for recipe in schedulers.SCHEDULERS.values()})
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2-v": "StableDiffusionPipeline",
    "sd1-inpainting": "StableDiffusionInpaintPipeline",
    "sd2-inpainting": "StableDiffusionInpaintPipeline",
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "x4-upscaler": "StableDiffusionUpscalePipeline",
}


@pytest.fixture(autouse=True)
def _cheap_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet of one operation, for ours and diffusers' alike: what differs here is what schedulers make of it."""
    import diffusers

    def forward(
        _: Any, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **__: Any
    ) -> tuple[torch.Tensor]:
        words = 10 * encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1)
        time = torch.as_tensor(timestep).to(sample.dtype).reshape(-1, 1, 1, 1) / 1000
        return (torch.tanh(sample[:, :4].roll(1, 3) + sample.mean(1, keepdim=True) + time + words),)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", forward)


@pytest.fixture
def both(reference: Load, tmp_path: Path) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """A picture of ours and one of diffusers', of a checkpoint's folder with another scheduler in it."""

    def make(
        family: str, config: Mapping[str, Any], name: str | None = None, pipeline_class: str = "", **given: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        found = reference(family)
        folder = with_scheduler(found.folder, tmp_path / "checkpoint", config)
        theirs = load_theirs(found, folder, pipeline_class or PIPELINES[family], name)
        ours = found.pipeline(check_safety=False)
        manifest = ours.manifest.model_copy(
            update={"scheduler": dict(config), "prediction_type": config.get("prediction_type", "epsilon")}
        )
        ours = Pipeline(manifest, ours.models, ours.tokenizer, name, check_safety=False)
        asked = {
            "prompt": "a cat",
            "negative_prompt": "red",
            "num_inference_steps": 4,
            "guidance_scale": 7.5,
            **given,
        }
        results = [one(**asked, generator=torch.Generator().manual_seed(3)).images[0] for one in (ours, theirs)]
        return np.asarray(results[0]), np.asarray(results[1])

    return make


def with_scheduler(source: Path, folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    for entry in source.iterdir():
        if entry.name not in ("scheduler", "model_index.json"):
            (folder / entry.name).symlink_to(entry)
    index = json.loads((source / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def load_theirs(found: Any, folder: Path, pipeline_class: str, name: str | None) -> Any:
    """``pipeline_class`` of diffusers from the folder; ``name``: with that scheduler, made from the folder's."""
    import diffusers

    networks = ("unet", "vae", "text_encoder", "depth_estimator", "tokenizer", "feature_extractor")
    parts = {part: getattr(found.diffusers, part) for part in networks if hasattr(found.diffusers, part)}
    if pipeline_class in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        parts["safety_checker"] = None
    if name is not None:
        recipe = schedulers.SCHEDULERS[name]
        kind = getattr(diffusers, recipe.class_name)
        parts["scheduler"] = kind.from_pretrained(str(folder), subfolder="scheduler", **recipe.settings)
    loaded = getattr(diffusers, pipeline_class).from_pretrained(str(folder), local_files_only=True, **parts)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def given_to(family: str) -> dict[str, Any]:
    if family.endswith("inpainting"):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (32, 0, 64, 64))
        return {"image": picture(), "mask_image": mask}
    return {"sd2-depth": {"image": picture()}, "x4-upscaler": {"image": picture(8)}}.get(family, {})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("class_name", CLASSES)
def test_the_checkpoints_own_scheduler(
    both: Callable[..., Any], psnr_db: Psnr, class_name: str, config: Mapping[str, Any]
) -> None:
    assert psnr_db(*both("sd1", {"_class_name": class_name, **config})) >= PARITY_DB


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("class_name", ["PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("family", [family for family in PIPELINES if family != "sd1"])
def test_every_class_of_pipeline_imposes_something_else(
    both: Callable[..., Any], psnr_db: Psnr, family: str, class_name: str, config: Mapping[str, Any]
) -> None:
    pair = both(family, {"_class_name": class_name, **config}, **given_to(family))
    assert psnr_db(*pair) >= PARITY_DB


@pytest.mark.parametrize("own", ["EulerDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_a_scheduler_chosen_by_name(both: Callable[..., Any], psnr_db: Psnr, name: str, own: str) -> None:
    assert psnr_db(*both("sd1", {"_class_name": own, **BETAS}, name)) >= PARITY_DB


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_image_to_image(both: Callable[..., Any], psnr_db: Psnr, config: Mapping[str, Any]) -> None:
    given = {"pipeline_class": "StableDiffusionImg2ImgPipeline", "image": picture(), "strength": 0.7}
    assert psnr_db(*both("sd1", {"_class_name": "DDIMScheduler", **config}, **given)) >= PARITY_DB


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("class_name", ["PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_in_painting_with_a_plain_checkpoint(
    both: Callable[..., Any], psnr_db: Psnr, class_name: str, config: Mapping[str, Any]
) -> None:
    given = {"pipeline_class": "StableDiffusionInpaintPipeline", **given_to("sd1-inpainting")}
    assert psnr_db(*both("sd1", {"_class_name": class_name, **config}, **given)) >= PARITY_DB


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "x4-upscaler"])
def test_settled_configurations_say_the_same_to_any_reader(family: str, config: Mapping[str, Any]) -> None:
    imposed = schedulers.imposed_on(family)
    for class_name in CLASSES:
        raw = {"_class_name": class_name, **config}
        made, again = schedulers.build(raw, None, imposed), schedulers.build(schedulers.settled(raw, imposed))
        assert plain(made) == plain(again)


def plain(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("class_name", CLASSES)
def test_another_scheduler_is_set_as_in_diffusers(reference: Load, psnr_db: Psnr, class_name: str) -> None:
    import diffusers

    kind, sd1 = getattr(diffusers, class_name), reference("sd1")
    asked: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4}
    ours, theirs = sd1.pipeline(check_safety=False), sd1.diffusers
    own, checker = theirs.scheduler, theirs.safety_checker
    try:
        theirs.safety_checker = None
        pictures = []
        for one in (ours, theirs):
            one.scheduler = kind.from_config(one.scheduler.config)
            pictures.append(np.asarray(one(**asked, generator=torch.Generator().manual_seed(3)).images[0]))
    finally:
        theirs.scheduler, theirs.safety_checker = own, checker
    assert psnr_db(*pictures) >= PARITY_DB
    assert isinstance(ours.scheduler, kind)
    repeated = ours(**asked, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(np.asarray(repeated), pictures[0])


def test_a_chosen_name_is_another_scheduler_again(reference: Load) -> None:
    pipeline = reference("sd1").pipeline()
    assert schedulers.name_of(pipeline.scheduler) == "pndm"
    pipeline.scheduler_name = "euler"
    assert schedulers.name_of(pipeline.scheduler) == "euler"


@pytest.mark.parametrize("wrong", ["ddim", None, 3, "class"])
def test_what_is_no_scheduler_is_refused(reference: Load, wrong: object) -> None:
    import diffusers

    with pytest.raises(InputError, match=r"^scheduler is a .*: expected a scheduler of diffusers"):
        reference("sd1").pipeline().scheduler = diffusers.DDIMScheduler if wrong == "class" else wrong


@pytest.mark.parametrize(
    "key", ["steps_offset", "num_train_timesteps", "beta_start", "timestep_spacing", "trained_betas"]
)
@pytest.mark.parametrize("value", ["x", None, [], {}, -1])
@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpm++ 2m", "unipc"])
def test_values_that_no_scheduler_can_use_end_in_one_line(name: str, key: str, value: object) -> None:
    try:
        built = schedulers.build({**BETAS, "_class_name": "DDIMScheduler", key: value}, name)
        schedulers.set_steps(built, 4)
    except InputError as error:
        assert "\n" not in str(error)


UNUSUAL: Mapping[str, Mapping[str, Any]] = {
    "DEISMultistepScheduler": {"use_karras_sigmas": True},
    "SASolverScheduler": {"use_karras_sigmas": True},
    "UniPCMultistepScheduler": {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"},
    "DDIMScheduler": {"prediction_type": "sample", "set_alpha_to_one": True},
    "PNDMScheduler": {"timestep_spacing": "trailing", "skip_prk_steps": None},
    "EulerDiscreteScheduler": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    "EulerAncestralDiscreteScheduler": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "DDPMScheduler": {"predict_epsilon": False, "variance_type": "fixed_large"},
    "LMSDiscreteScheduler": {"tensor_format": "pt", "timestep_values": [], "_diffusers_version": "0.0.4"},
    "DPMSolverMultistepScheduler": {"thresholding": True, "algorithm_type": "dpmsolver++", "use_lu_lambdas": True},
    "IPNDMScheduler": {"steps_offset": 3},
    "EDMEulerScheduler": {},
    "CMStochasticIterativeScheduler": {},  # its timesteps go beyond those of the training
    "DDIMParallelScheduler": {"prediction_type": "v_prediction"},
    "CogVideoXDDIMScheduler": {},
}
SOLVERS = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)


@pytest.mark.parametrize("class_name", UNUSUAL)
def test_settings_that_few_checkpoints_have(both: Callable[..., Any], psnr_db: Psnr, class_name: str) -> None:
    config = {"_class_name": class_name, **BETAS, **UNUSUAL[class_name]}
    assert psnr_db(*both("sd1", config)) >= PARITY_DB


@pytest.mark.parametrize("sigmas", [{}, {"use_flow_sigmas": True, "flow_shift": 3.0}], ids=["betas", "flow"])
@pytest.mark.parametrize("class_name", SOLVERS)
def test_flow_predictions(
    both: Callable[..., Any], psnr_db: Psnr, class_name: str, sigmas: Mapping[str, Any]
) -> None:
    config = {"_class_name": class_name, **BETAS, "prediction_type": "flow_prediction", **sigmas}
    assert psnr_db(*both("sd1", config)) >= PARITY_DB


@pytest.mark.parametrize("class_name", SOLVERS[:3])
def test_previews_of_flow_predictions_are_what_the_solver_makes_of_them(class_name: str) -> None:
    config = {"_class_name": class_name, **BETAS, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = schedulers.build(config)
    schedulers.set_steps(scheduler, 4)
    latents, prediction = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    for timestep in scheduler.timesteps:
        shown = denoising.denoised(scheduler, latents, prediction, timestep.item())
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        torch.testing.assert_close(shown, scheduler.convert_model_output(prediction, sample=latents))
        latents = scheduler.step(prediction, timestep, latents).prev_sample


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_unipc_on_predicted_noise(both: Callable[..., Any], psnr_db: Psnr, solver: str, order: int) -> None:
    config = {**BETAS, "predict_x0": False, "solver_type": solver, "solver_order": order}
    config |= {"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}
    assert psnr_db(*both("sd1", config)) >= PARITY_DB


@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": "UniPCMultistepScheduler", "predict_x0": False},
        {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"},
    ],
    ids=str,
)
def test_settings_with_which_diffusers_draws_black_say_whose_fault_it_is(
    reference: Load, tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    found, config = reference("sd1"), {**BETAS, **settings}
    folder = with_scheduler(found.folder, tmp_path / "checkpoint", config)
    theirs = load_theirs(found, folder, "StableDiffusionPipeline", None)
    assert not np.asarray(theirs("a cat", num_inference_steps=4).images[0]).any()
    ours = found.pipeline(check_safety=False)
    manifest = ours.manifest.model_copy(update={"scheduler": config})
    pipeline = Pipeline(manifest, ours.models, ours.tokenizer, check_safety=False)
    with pytest.raises(InputError, match=r"^the latents are not numbers[^\n]*choose another scheduler[^\n]*$"):
        pipeline("a cat", num_inference_steps=4, seed=3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e6, float("inf"), float("nan")])
def test_latents_that_no_decoder_takes_are_not_its_fault(reference: Load, size: float) -> None:
    pipeline = reference("sd1").pipeline(check_safety=False)
    with pytest.raises(InputError, match=r"^the latents are not numbers, or too large for float16"):
        pipeline.decode(torch.full((1, 4, 8, 8), size))


LEVELS: Mapping[str, Mapping[str, Any]] = {
    "EDM": {"_class_name": "EDMEulerScheduler", "sigma_max": 60.0},
    "EDM, v": {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0},
    "EDM, multistep": {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.7},
    "continuous v": {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "sigma_max": 120.0,
        "sigma_min": 0.002,
    },
    "exponential": {"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True},
    "beta": {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True},
}
"""Noise levels that are not the usual ones of the training: Playground v2.5's, CosXL's."""


@pytest.mark.parametrize("levels", LEVELS)
def test_other_noise_levels(both: Callable[..., Any], psnr_db: Psnr, levels: str) -> None:
    assert psnr_db(*both("sd1", {**BETAS, **LEVELS[levels]})) >= PARITY_DB


@pytest.mark.parametrize("levels", LEVELS)
def test_previews_end_in_the_picture_whatever_the_noise_levels(reference: Load, levels: str) -> None:
    """The last step of all of these goes to the clean latents that the UNet sees, and so does a preview of it."""
    ours = reference("sd1").pipeline(check_safety=False)
    config = {**BETAS, **LEVELS[levels]}
    told = {"scheduler": config, "prediction_type": config.get("prediction_type", "epsilon")}
    pipeline = Pipeline(ours.manifest.model_copy(update=told), ours.models, ours.tokenizer, check_safety=False)
    shown: list[torch.Tensor] = []
    asked: dict[str, Any] = {"num_inference_steps": 5, "seed": 3, "output_type": "latent"}
    made = pipeline("a cat", **asked, on_step=lambda step: shown.append(step.preview())).images
    assert (shown[-1] - made).abs().max() < 0.02 * made.abs().max()
    assert (shown[0] - made).abs().max() > 0.02 * made.abs().max()


@pytest.mark.parametrize("levels", ["EDM", "continuous v"])
def test_schedulers_without_these_noise_levels_are_refused(levels: str) -> None:
    """They would draw noise."""
    config = {**BETAS, **LEVELS[levels]}
    for name in ("ddim", "dpm++ 2m karras"):
        with pytest.raises(InputError, match=f"EDM's noise levels, which .* for their own {config['_class_name']}"):
            schedulers.build(config, name)
    assert not schedulers.has_usual_noise(config)
    assert not schedulers.has_signal(config, "sdxl")


def test_edms_schedulers_take_each_others_place(reference: Load) -> None:
    """As users of Playground v2.5 are told to."""
    import diffusers

    pipeline = reference("sd1").pipeline(check_safety=False)
    own: Any = diffusers.EDMEulerScheduler
    other: Any = diffusers.EDMDPMSolverMultistepScheduler
    pipeline.scheduler = other.from_config(own().config)
    assert pipeline("a cat", num_inference_steps=3, seed=3).images[0].size == (64, 64)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "euler"),
        ({"use_karras_sigmas": True}, "euler karras"),
        ({"use_exponential_sigmas": True}, None),
        ({"use_beta_sigmas": True}, None),
    ],
)
def test_only_a_name_that_makes_the_same_scheduler_is_recorded(settings: dict[str, Any], name: str | None) -> None:
    """A picture is repeated by the recorded name, or by the models' own scheduler."""
    config = {"_class_name": "EulerDiscreteScheduler", **BETAS, **settings}
    built = schedulers.build(config)
    assert schedulers.recorded(built) == name
    again = schedulers.build(config, name)
    for one in (built, again):
        schedulers.set_steps(one, 6)
    assert torch.equal(built.sigmas, again.sigmas)


@pytest.mark.parametrize(
    "class_name",
    [
        *("RePaintScheduler", "ScoreSdeVeScheduler", "KarrasVeScheduler", "VQDiffusionScheduler"),
        *("FlowMatchEulerDiscreteScheduler", "ScoreSdeVpScheduler", "UnCLIPScheduler", "FlaxPNDMScheduler"),
        *("DDPMWuerstchenScheduler", "CogVideoXDPMScheduler", "SCMScheduler", "AmusedScheduler"),
    ],
)
def test_schedulers_of_other_pipelines_end_in_one_line(reference: Load, class_name: str) -> None:
    ours = reference("sd1").pipeline(check_safety=False)
    manifest = ours.manifest.model_copy(update={"scheduler": {"_class_name": class_name, **BETAS}})
    with pytest.raises(InputError, match=r"^(the models ask for an unknown )?scheduler[^\n]*$"):
        Pipeline(manifest, ours.models, ours.tokenizer, check_safety=False)("a cat", num_inference_steps=2, seed=3)


def test_a_variance_that_no_unet_here_predicts_ends_in_one_line(reference: Load) -> None:
    ours = reference("sd1").pipeline(check_safety=False)
    config = {"_class_name": "DDPMScheduler", **BETAS, "variance_type": "learned_range"}
    pipeline = Pipeline(
        ours.manifest.model_copy(update={"scheduler": config}), ours.models, ours.tokenizer, check_safety=False
    )
    with pytest.raises(InputError, match=r"^scheduler ddpm: [^\n]*$"):
        pipeline("a cat", num_inference_steps=2, seed=3)


def test_settings_that_another_class_left_are_passed_over() -> None:
    """A solver's order in PNDM's configuration was an AttributeError when the steps were set."""
    scheduler = schedulers.build({"_class_name": "PNDMScheduler", "solver_order": 2, "final_sigmas_type": "zero"})
    schedulers.set_steps(scheduler, 7)
    assert "solver_order" in scheduler.config
    assert len(scheduler.timesteps) >= 7
