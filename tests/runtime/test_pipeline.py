"""Text to image against diffusers' own pipeline: same weights, same seed, same picture."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_runtime import schedulers
from diffusion_runtime.denoising import Step
from diffusion_runtime.errors import DiffusionError, InputError
from diffusion_runtime.models import Models
from diffusion_runtime.noise import from_seeds
from diffusion_runtime.pipeline import Pipeline, RuntimeNote
from diffusion_runtime.tasks import Request

pytestmark = pytest.mark.usefixtures("dpm2_made_at_once")

PARITY_DB, STEPS = 40.0, 5
PROMPT = "a photo of an astronaut riding a horse"
Reference = Any
Load = Callable[[str], Reference]
Psnr = Callable[[Any, Any], float]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected(
    reference: Reference, scheduler: str | None = None, prediction_type: str = "", **arguments: Any
) -> Any:
    """What diffusers makes, with the scheduler that our table builds. A list of 8-bit arrays."""
    pipe = reference.diffusers
    own, checker = pipe.scheduler, pipe.safety_checker
    try:
        config = reference.manifest(2).scheduler
        config = {**config, "prediction_type": prediction_type or config["prediction_type"]}
        pipe.scheduler = schedulers.build(config, scheduler)
        pipe.safety_checker = None
        images = pipe(
            **{"prompt": PROMPT, "num_inference_steps": STEPS, "generator": generator(), **arguments}
        ).images
    finally:
        pipe.scheduler, pipe.safety_checker = own, checker
    return [np.asarray(image) for image in images]


def returned(model: Any) -> Any:
    return model


def made(pipeline: Pipeline, **arguments: Any) -> list[np.ndarray]:
    result = pipeline(**{"prompt": PROMPT, "num_inference_steps": STEPS, "generator": generator(), **arguments})
    return [np.asarray(image) for image in result.images]


@pytest.mark.parametrize("scheduler", schedulers.SCHEDULERS)
def test_every_scheduler_makes_diffusers_picture(reference: Load, psnr_db: Psnr, scheduler: str) -> None:
    sd1 = reference("sd1")
    ours = made(sd1.pipeline(scheduler=scheduler, check_safety=False), negative_prompt="red")
    assert psnr_db(ours[0], expected(sd1, scheduler, negative_prompt="red")[0]) >= PARITY_DB


@pytest.mark.parametrize("family", ["sd1", "sd1-odd", "sd2-base", "sd2-v"])
def test_every_family_makes_diffusers_picture(reference: Load, psnr_db: Psnr, family: str) -> None:
    found = reference(family)
    ours = made(found.pipeline(check_safety=False))
    assert psnr_db(ours[0], expected(found)[0]) >= PARITY_DB


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_any_batch_size_makes_the_same_pictures(
    reference: Load, psnr_db: Psnr, batch_size: int, guidance_scale: float
) -> None:
    sd1 = reference("sd1")
    asked: dict[str, Any] = {"num_images_per_prompt": 3, "guidance_scale": guidance_scale, "num_inference_steps": 4}
    ours = made(sd1.pipeline(batch_size, check_safety=False), **asked)
    theirs = expected(sd1, **asked)
    assert len(ours) == len(theirs) == 3
    assert min(psnr_db(a, b) for a, b in zip(ours, theirs, strict=True)) >= PARITY_DB


@pytest.mark.parametrize(
    ("scheduler", "asked"),
    [
        ("ddim", {"eta": 0.7}),
        ("ddim", {"guidance_scale": 0.0, "negative_prompt": "red"}),
        ("euler", {"guidance_scale": 0.5}),
        ("pndm", {"guidance_scale": 1.0, "negative_prompt": "red"}),
        ("ddim", {"prompt": ["a cat", "a horse"], "num_images_per_prompt": 2, "negative_prompt": ["red", "dog"]}),
        ("ddim", {"prompt": ["a cat"], "height": 64, "width": 64, "clip_skip": None, "return_dict": True}),
    ],
)
def test_what_a_user_of_diffusers_asks_for(
    reference: Load, psnr_db: Psnr, scheduler: str, asked: dict[str, Any]
) -> None:
    sd1, request = reference("sd1"), {"num_inference_steps": 4, **asked}
    ours = made(sd1.pipeline(scheduler=scheduler, check_safety=False), **request)
    theirs = expected(sd1, scheduler, **request)
    assert len(ours) == len(theirs)
    assert min(psnr_db(a, b) for a, b in zip(ours, theirs, strict=True)) >= PARITY_DB


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_prediction_type_is_the_manifests(reference: Load, psnr_db: Psnr, prediction: str) -> None:
    sd1 = reference("sd1")
    pipeline = sd1.pipeline(scheduler="ddim", check_safety=False)
    changed = replace(pipeline, manifest=pipeline.manifest.model_copy(update={"prediction_type": prediction}))
    theirs = expected(sd1, "ddim", prediction_type=prediction, num_inference_steps=5)
    assert psnr_db(made(changed, num_inference_steps=5)[0], theirs[0]) >= PARITY_DB


def test_generators_for_each_picture_are_used_one_by_one(reference: Load, psnr_db: Psnr) -> None:
    sd1 = reference("sd1")
    both: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 4}
    pipeline = sd1.pipeline(scheduler="euler-ancestral", check_safety=False)
    ours = made(pipeline, **both, generator=[generator(5), generator(6)])
    theirs = expected(sd1, "euler-ancestral", **both, generator=[generator(5), generator(6)])
    alone = made(pipeline, num_inference_steps=4, generator=generator(6))
    assert min(psnr_db(a, b) for a, b in zip(ours, theirs, strict=True)) >= PARITY_DB
    assert np.abs(ours[1].astype(int) - alone[0]).max() <= 1


def test_several_prompts_each_with_its_negative(reference: Load, psnr_db: Psnr) -> None:
    sd1 = reference("sd1")
    asked: dict[str, Any] = {
        "prompt": ["a cat", "a horse"],
        "negative_prompt": ["red", "white"],
        "num_inference_steps": 4,
    }
    ours, theirs = made(sd1.pipeline(check_safety=False), **asked), expected(sd1, **asked)
    assert min(psnr_db(a, b) for a, b in zip(ours, theirs, strict=True)) >= PARITY_DB
    assert psnr_db(ours[0], ours[1]) < PARITY_DB


def test_an_empty_negative_prompt_is_encoded_not_zeroed(reference: Load, psnr_db: Psnr) -> None:
    pipeline = reference("sd1").pipeline(check_safety=False)
    zeroing = pipeline.manifest.model_copy(update={"force_zeros_for_empty_prompt": True})
    zeroed = made(Pipeline(zeroing, pipeline.models, pipeline.tokenizer, check_safety=False))
    assert psnr_db(made(pipeline)[0], made(pipeline, negative_prompt="")[0]) == float("inf")
    assert psnr_db(made(pipeline)[0], zeroed[0]) < PARITY_DB


def test_seed_stands_for_a_torch_generator(reference: Load) -> None:
    pipeline = reference("sd1").pipeline(check_safety=False)
    same = made(pipeline, generator=None, seed=3, num_inference_steps=3)
    assert np.array_equal(same[0], made(pipeline, num_inference_steps=3)[0])
    several = made(pipeline, generator=None, seed=[2, 3], num_images_per_prompt=2, num_inference_steps=3)
    assert np.abs(several[1].astype(int) - same[0]).max() <= 1


def test_callers_latents_are_used(reference: Load, psnr_db: Psnr) -> None:
    sd1 = reference("sd1")
    latents = torch.randn(1, 4, 8, 8, generator=generator(9))
    ours = made(sd1.pipeline(check_safety=False), latents=latents, num_inference_steps=4)
    assert psnr_db(ours[0], expected(sd1, latents=latents, num_inference_steps=4)[0]) >= PARITY_DB


def count_calls(pipeline: Pipeline, **arguments: Any) -> int:
    made(pipeline, num_inference_steps=4, **arguments)
    return pipeline.models.timings["unet"].calls


@pytest.mark.parametrize(
    ("batch_size", "guidance_scale", "pictures", "calls"),
    [(1, 7.5, 1, 2), (1, 1.0, 1, 1), (2, 7.5, 1, 1), (2, 1.0, 2, 1), (2, 0.5, 4, 2), (2, 7.5, 2, 2)],
)
def test_guidance_off_is_half_the_work(
    reference: Load, batch_size: int, guidance_scale: float, pictures: int, calls: int
) -> None:
    pipeline = reference("sd1").pipeline(batch_size, scheduler="ddim", check_safety=False)
    asked = {"guidance_scale": guidance_scale, "num_images_per_prompt": pictures}
    assert count_calls(pipeline, **asked) == 4 * calls


def test_each_distinct_text_is_encoded_once(reference: Load) -> None:
    pipeline = reference("sd1").pipeline(check_safety=False)
    made(pipeline, num_images_per_prompt=3, num_inference_steps=2)
    assert pipeline.models.timings["text_encoder"].calls == 2


def test_steps_can_be_watched_and_the_loop_left(reference: Load) -> None:
    pipeline = reference("sd1").pipeline(scheduler="ddim", check_safety=False)
    run = pipeline.prepare(Request((PROMPT,), steps=8), from_seeds([1]))
    seen = []
    for step in pipeline.denoise(run):
        seen.append((step.index, step.total))
        if step.index == 2:
            break
    assert seen == [(0, 8), (1, 8), (2, 8)]
    assert pipeline.models.timings["unet"].calls == 3


def test_a_callback_can_cancel_by_raising(reference: Load) -> None:
    class Enough(Exception):
        pass

    def stop(step: Step) -> None:
        if step.index == 1:
            raise Enough

    pipeline = reference("sd1").pipeline(check_safety=False)
    with pytest.raises(Enough):
        made(pipeline, on_step=stop)
    assert pipeline.models.timings["unet"].calls == 2


def halve_and_stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Changes the latents in the second step and stops after the fourth, as diffusers' documentation does."""
    if index == 1:
        tensors["latents"] = tensors["latents"] / 2
    pipe._interrupt = index == 3
    assert float(timestep) > 0
    return tensors


def test_diffusers_callback_changes_latents_and_interrupts(reference: Load, psnr_db: Psnr) -> None:
    sd1 = reference("sd1")
    given: dict[str, Any] = {"callback_on_step_end": halve_and_stop, "num_inference_steps": 6}
    pipeline = sd1.pipeline(scheduler="euler", check_safety=False)
    ours = made(pipeline, **given)
    assert pipeline.models.timings["unet"].calls == 4
    assert psnr_db(ours[0], expected(sd1, "euler", **given)[0]) >= PARITY_DB
    assert psnr_db(ours[0], made(pipeline, num_inference_steps=6)[0]) < PARITY_DB


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm", "dpm++ 2m"])
def test_the_preview_of_the_last_step_is_the_picture(reference: Load, psnr_db: Psnr, scheduler: str) -> None:
    pipeline = reference("sd1").pipeline(scheduler=scheduler, check_safety=False)
    run = pipeline.prepare(Request((PROMPT,), steps=30), from_seeds([1]))
    steps = list(pipeline.denoise(run))
    final = np.asarray(pipeline.finish(run, steps[-1].latents).images[0])
    far = psnr_db(np.asarray(pipeline.preview(steps[0])), final)
    near = psnr_db(np.asarray(pipeline.preview(steps[-1])), final)
    assert near >= 30 and near > far


def test_output_types(reference: Load) -> None:
    pipeline = reference("sd1").pipeline(check_safety=False)
    asked: dict[str, Any] = {"num_inference_steps": 2, "generator": generator()}
    array = pipeline(PROMPT, output_type="np", **asked).images
    latent = pipeline(PROMPT, output_type="latent", **asked).images
    tensor = pipeline(PROMPT, output_type="pt", **asked)[0]
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (1, 3, 64, 64) and tensor.min() >= 0
    assert isinstance(array, np.ndarray) and array.shape == (1, 64, 64, 3) and 0 <= array.min() <= array.max() <= 1
    assert isinstance(latent, torch.Tensor) and latent.shape == (1, 4, 8, 8)


def test_a_cut_prompt_is_quoted_in_a_warning(reference: Load, psnr_db: Psnr) -> None:
    sd1 = reference("sd1")
    long = "a cat " * 40 + "on the white horse"
    with pytest.warns(RuntimeNote, match="cut after 75 tokens; lost: .*on the white horse"):
        ours = made(sd1.pipeline(check_safety=False), prompt=long, num_inference_steps=3)
    assert psnr_db(ours[0], expected(sd1, prompt=long, num_inference_steps=3)[0]) >= PARITY_DB


def test_a_long_prompt_fills_the_pieces_that_the_unet_has_room_for(reference: Load, psnr_db: Psnr) -> None:
    """Against diffusers given the states of the pieces, each encoded with its own start and end."""
    sd1 = reference("sd1")
    pipe, pipeline = sd1.diffusers, sd1.pipeline(check_safety=False, text_length=154)
    words = ["cat", "horse", "red", "circle"] * 25
    prompt, pieces = " ".join(words), (" ".join(words[:75]), " ".join(words[75:]))

    def states(*texts: str) -> torch.Tensor:
        ids = [
            pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
            for text in texts
        ]
        with torch.no_grad():
            return torch.cat([pipe.text_encoder(one)[0] for one in ids], dim=1)

    theirs = expected(
        sd1,
        prompt=None,
        prompt_embeds=states(*pieces),
        negative_prompt_embeds=states("", ""),
        num_inference_steps=4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeNote)
        ours = made(pipeline, prompt=prompt, long_prompt=True, num_inference_steps=4)
    assert psnr_db(ours[0], theirs[0]) >= PARITY_DB


def test_a_long_prompt_without_room_is_refused(reference: Load) -> None:
    with pytest.raises(InputError, match="longer than the 75 tokens"):
        made(reference("sd1").pipeline(), prompt="cat " * 100, long_prompt=True)


@pytest.mark.parametrize("prompt", ["", "🐱🚀 ünïcödé 日本", "(" * 50, "a " * 5000, "\n\t "])
def test_odd_prompts_make_diffusers_picture(reference: Load, psnr_db: Psnr, prompt: str) -> None:
    sd1 = reference("sd1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeNote)
        ours = made(sd1.pipeline(check_safety=False), prompt=prompt, num_inference_steps=2)
    assert psnr_db(ours[0], expected(sd1, prompt=prompt, num_inference_steps=2)[0]) >= PARITY_DB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "0 steps: expected a whole number, at least 1"),
        ({"num_inference_steps": 1001}, "1001 steps: expected 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance scale nan"),
        ({"guidance_scale": float("inf")}, "guidance scale inf"),
        ({"height": 128, "width": 64}, r"64x128 pixels: these models make 64x64"),
        ({"width": 0}, r"0x64 pixels: these models make 64x64"),
        ({"num_images_per_prompt": 0}, "0 pictures per prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": "a \ud800 cat"}, "not valid Unicode at character 3"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "1 negative prompts for 2 prompts"),
        ({"seed": 1}, "generator and seed are both given"),
        ({"generator": None, "seed": -1}, "seed -1: expected a whole number, 0 to"),
        ({"generator": None, "seed": 1, "rng": "dice"}, "unknown random number generator 'dice'"),
        ({"generator": []}, "an empty list of generators"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators or seeds for 1 pictures"),
        ({"generator": 5}, "generator is a int: expected torch.Generator; numbers go into seed="),
        ({"generator": None, "seed": 1.5}, "seed 1.5: expected a whole number"),
        ({"generator": None, "seed": []}, "an empty list of seeds"),
        ({"output_type": "jpeg"}, "output type 'jpeg': expected one of pil, np, pt, latent"),
        ({"num_inference_steps": 2.5}, "2.5 steps: expected a whole number"),
        ({"num_inference_steps": "2"}, "'2' steps: expected a whole number"),
        ({"num_images_per_prompt": "2"}, "'2' pictures per prompt: expected a whole number"),
        ({"guidance_scale": "7"}, "guidance scale '7': expected a number"),
        ({"guidance_scale": True}, "guidance scale True: expected a number"),
        ({"eta": "0.5"}, "eta '0.5': expected a number"),
        ({"strength": "0.5"}, "strength '0.5': expected a number"),
        ({"noise_level": "20"}, "noise level '20': expected a whole number"),
        ({"height": "64"}, "height '64': expected a whole number of pixels"),
        ({"depth_map": "depth.png"}, "depth is a str: expected a PIL picture or a tensor"),
        ({"long_prompt": "no"}, "long_prompt 'no': expected True or False"),
        ({"generator": None, "seed": "1"}, "seed '1': expected a whole number"),
        ({"guidance_scale": 1e300}, "guidance scale 1e[+]300"),
        ({"eta": 1.1}, "eta 1.1: expected a number, 0 to 1"),
        ({"height": 128}, r"64x128 pixels: these models make 64x64"),
        ({"prompt": None}, "prompt is a NoneType: expected a text or a list of texts"),
        ({"image": np.zeros((64, 64, 3))}, "image is a ndarray: expected one PIL picture"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents are a ndarray: expected a tensor"),
        ({"strength": 0.5}, "given a strength, but these models do text to image: a prompt alone; or image to"),
        ({"noise_level": 20}, "given a noise level, but these models do text to image"),
        ({"timesteps": [9], "sigmas": [1.0]}, "timesteps, sigmas: diffusers has it, this pipeline does not; "),
        ({"sigmas": np.array([1.0, 0.5])}, "sigmas: diffusers has it, .* load_diffusers_pipeline"),
        ({"clip_skip": 2}, "clip skip 2: it is part of the models, .* convert again with --clip-skip 2"),
        ({"guidance": 3}, "unknown argument guidance"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, "only 'latents' can be had"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, r"gave latents \(1,\), expected"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, r"latents have shape \(1, 4, 9, 9\)"),
        ({"prompt": "a (cat:99)"}, "prompt weight 99: expected 0 to 10"),
    ],
)
def test_bad_arguments_are_one_clear_line(reference: Load, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        made(reference("sd1").pipeline(), **arguments)
    assert "\n" not in str(caught.value)


def test_states_in_place_of_a_prompt_are_refused_by_name(reference: Load) -> None:
    asked: dict[str, Any] = {"prompt_embeds": torch.zeros(1, 77, 32)}
    with pytest.raises(InputError, match="prompt_embeds: diffusers has it, this pipeline does not"):
        reference("sd1").pipeline()(**asked)


def test_numpys_numbers_are_numbers(reference: Load) -> None:
    pipeline = reference("sd1").pipeline(check_safety=False)
    asked: dict[str, Any] = {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(7.5)}
    assert np.array_equal(made(pipeline, **asked)[0], made(pipeline, num_inference_steps=2)[0])


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "dpm++ 2m", "unipc"])
def test_more_steps_than_there_are_timesteps_for_are_refused(reference: Load, scheduler: str) -> None:
    with pytest.raises(InputError, match=rf"scheduler {re.escape(scheduler)} cannot take as many as 1000 steps"):
        made(reference("sd1").pipeline(scheduler=scheduler), num_inference_steps=1000)


def test_lcm_with_more_steps_than_it_knows_is_refused(reference: Load) -> None:
    with pytest.raises(InputError, match="scheduler lcm with 60 steps"):
        made(reference("sd1").pipeline(scheduler="lcm"), num_inference_steps=60)


@pytest.mark.parametrize("broken", ["text_encoder", "unet", "vae_decoder"])
def test_a_model_that_computes_nan_is_named(reference: Load, broken: str) -> None:
    sd1 = reference("sd1")
    good = sd1.models(2)

    def nan(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value * np.nan for name, value in good[broken](**arrays).items()}

    class Broken:
        inputs, outputs = good[broken].inputs, good[broken].outputs
        __call__ = staticmethod(nan)

    models = Models({name: partial(returned, model) for name, model in {**good, broken: Broken()}.items()})
    pipeline = sd1.pipeline()
    with pytest.raises(DiffusionError, match=f"{broken} gave values that are not numbers"):
        made(Pipeline(pipeline.manifest, models, pipeline.tokenizer), num_inference_steps=2)


def test_reduced_memory_keeps_one_stage_at_a_time(reference: Load) -> None:
    sd1 = reference("sd1")
    alive: list[str] = []
    most: list[int] = []

    def load(name: str) -> Callable[[], Any]:
        model = sd1.models(2)[name]

        class Counted:
            inputs, outputs = model.inputs, model.outputs

            def __init__(self) -> None:
                alive.append(name)
                most.append(len(alive))

            def __del__(self) -> None:
                alive.remove(name)

            def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
                return dict(model(**arrays))

        return Counted

    kept = sd1.pipeline()
    models = Models({name: load(name) for name in kept.models.loads}, keep=False)
    made(Pipeline(kept.manifest, models, kept.tokenizer), num_inference_steps=2)
    assert max(most) == 1, most
