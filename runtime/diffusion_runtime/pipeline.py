"""Prompt to picture: encode, denoise, decode, check. No files, no backends: models are callables, pictures values.

    job = pipeline.prepare("a red circle", seed=1)
    for step in pipeline.denoise(job):      # progress, previews; leaving the loop cancels
        print(step.index, step.total)
    pictures = pipeline.finish(job, step.latents).images

`Pipeline.__call__` is these three in one, with the argument names of diffusers' pipelines.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion_runtime import denoising, guidance, images, schedulers, tasks
from diffusion_runtime import noise as noises
from diffusion_runtime.denoising import Step
from diffusion_runtime.errors import InputError
from diffusion_runtime.manifest import Manifest
from diffusion_runtime.models import Models
from diffusion_runtime.safety import is_flagged
from diffusion_runtime.tasks import Request
from diffusion_runtime.text import TextStates

if TYPE_CHECKING:
    from PIL import Image

    from diffusion_runtime.tokenizer import Tokenizer

Texts = str | Sequence[str]
OUTPUT_TYPES = ("pil", "np", "latent")


class RuntimeNote(UserWarning):
    """Something the caller should know: a prompt that was cut, a picture that was resized."""


@dataclass(frozen=True, slots=True)
class Result:
    """``images`` as asked for by ``output_type``; ``nsfw_content_detected`` has one entry per picture, or is None
    where nothing was checked. ``notes`` are for the user."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """A prepared run: everything up to the first step."""

    job: tasks.Job
    task: tasks.Task
    predict: guidance.Predict
    start: denoising.Start

    @property
    def total(self) -> int:
        """How many steps `Pipeline.denoise` will yield."""
        return len(self.start.timesteps)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.job.notes)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The models of one bundle. ``scheduler_name`` None is the checkpoint's own; ``check_safety`` uses the safety
    checker where there is one. ``notes`` say what was chosen or assumed when the models were opened."""

    manifest: Manifest
    models: Models
    tokenizer: Tokenizer
    scheduler_name: str | None = None
    check_safety: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        height, width = self.models["unet"].inputs["sample"].shape[2:]
        return height * self.manifest.latents.factor, width * self.manifest.latents.factor

    @property
    def batch_size(self) -> int:
        """How many rows the UNet takes in one call."""
        return self.models["unet"].inputs["sample"].shape[0]

    def prewarm(self) -> None:
        """Load every model that a prompt alone needs and run it once, so that the first picture takes no longer
        than the next. Loads what `reduce_memory` would free, so it is of no use with that."""
        needed = ["text_encoder", "unet", "vae_decoder"]
        checks = ["safety_checker"] if self.check_safety and "safety_checker" in self.models else []
        self.models.prewarm(needed + checks)

    def __call__(
        self,
        prompt: Texts,
        negative_prompt: Texts | None = None,
        *,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        depth_map: Image.Image | torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        strength: float | None = None,
        noise_level: int = 20,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        rng: str = "torch",
        latents: torch.Tensor | None = None,
        long_prompt: bool = False,
        output_type: str = "pil",
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Make pictures. Names and defaults are those of diffusers' pipelines; ``seed`` with ``rng`` stands for a
        generator, and ``on_step`` is called after each step (raise in it to cancel).

        ``strength`` None is 0.8 with an image and 1 in in-painting, as in diffusers. Raises InputError for what
        cannot be used and DiffusionError where a model computes NaN. Notes are issued as `RuntimeNote` warnings."""
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output type {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        run = self.prepare(
            prompt,
            negative_prompt,
            image=image,
            mask_image=mask_image,
            depth_map=depth_map,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            strength=strength,
            noise_level=noise_level,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            noise=_noise(generator, seed, rng),
            latents=latents,
            long_prompt=long_prompt,
        )
        finished = run.start.latents
        for step in self.denoise(run):
            finished = step.latents
            if on_step is not None:
                on_step(step)
        result = self.finish(run, finished, output_type)
        for note in result.notes:
            warnings.warn(note, RuntimeNote, stacklevel=2)
        return result

    def prepare(
        self,
        prompt: Texts,
        negative_prompt: Texts | None = None,
        *,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        depth_map: Image.Image | torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        strength: float | None = None,
        noise_level: int = 20,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        noise: noises.Noise,
        latents: torch.Tensor | None = None,
        long_prompt: bool = False,
    ) -> Run:
        """Check everything, encode prompts and what else the task needs. Bad input raises before a model runs."""
        given = {
            name
            for name, value in (("image", image), ("mask", mask_image), ("depth", depth_map))
            if value is not None
        }
        task = tasks.choose(self._channels(), given)
        prompts, negatives = _texts(prompt, negative_prompt, num_images_per_prompt)
        request = Request(
            prompts,
            negatives,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            image=image,
            mask=mask_image,
            depth=depth_map,
            strength=_strength(strength, task),
            noise_level=noise_level,
            latents=latents,
            long_prompt=long_prompt,
        )
        self._check_size(height, width)
        guidance.is_guided(guidance_scale)
        scheduler = schedulers.build(self.manifest.scheduler, self.scheduler_name)
        schedulers.set_steps(scheduler, num_inference_steps)
        job = tasks.Job(request, self.manifest, self.models, scheduler, noise)
        return self._prepared(job, task)

    def denoise(self, run: Run) -> Iterator[Step]:
        """Yield after every step of a prepared run; a run can be used once."""
        job = run.job
        yield from denoising.denoise(run.predict, job.scheduler, run.start, job.noise, job.request.eta)
        self.models.release("unet")

    def finish(self, run: Run, latents: torch.Tensor, output_type: str = "pil") -> Result:
        """Decode and check what the last step gave. A flagged picture is wholly black."""
        if output_type == "latent":
            return Result(latents, None, run.notes)
        arrays = images.to_arrays(self.decode(latents))
        self.models.release("vae_decoder")
        flags = None
        if self.check_safety and "safety_checker" in self.models:
            flags = [is_flagged(self.models["safety_checker"], picture) for picture in arrays]
            arrays[np.array(flags)] = 0.0
            self.models.release("safety_checker")
        return Result(arrays if output_type == "np" else images.to_pil(arrays), flags, run.notes)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, channels, height, width) to pictures (n, 3, height, width) in about -1..1."""
        decoder = self.models["vae_decoder"]
        (name, spec), *_ = decoder.inputs.items()
        scaled = (latents / self.manifest.latents.scale + self.manifest.latents.shift).numpy().astype(spec.dtype)
        pictures = [decoder.one("image", **{name: scaled[i : i + 1]}) for i in range(len(scaled))]
        return torch.from_numpy(np.concatenate(pictures)).float()

    def preview(self, step: Step, index: int = 0) -> Image.Image:
        """The picture as it will be, judged from this step (one call of the decoder)."""
        return images.to_pil(images.to_arrays(self.decode(step.preview()[index : index + 1])))[0]

    def _prepared(self, job: tasks.Job, task: tasks.Task) -> Run:
        request = job.request
        guided = guidance.is_guided(request.guidance_scale)
        texts = TextStates(self.models, self.tokenizer, self.manifest, request.long_prompt)
        pairs = zip(request.negative_prompts, request.prompts, strict=True)
        ordered = [text for pair in pairs for text in pair] if guided else list(request.prompts)
        states, notes = texts.encode(ordered)
        job.notes.extend(notes)
        self.models.release("text_encoder")
        prepared = task.prepare(job)
        rows = {name: torch.full((len(ordered), 1), value)[:, 0] for name, value in prepared.labels.items()}
        conditions = guidance.Conditions({"encoder_hidden_states": states, **rows}, prepared.channels)
        unet = self.models["unet"]
        predict = guidance.predictor(unet, request.pictures, conditions, request.guidance_scale)
        return Run(job, task, predict, prepared.start)

    def _channels(self) -> int:
        sample = self.models["unet"].inputs.get("sample")
        if sample is None or len(sample.shape) != 4:
            raise InputError(f"unet: expected an input `sample` of four dimensions, got {sample}")
        return sample.shape[1]

    def _check_size(self, height: int | None, width: int | None) -> None:
        have_height, have_width = self.size
        if (height or have_height, width or have_width) != (have_height, have_width):
            raise InputError(
                f"{width}x{height} pixels: these models make {have_width}x{have_height} (width x height); convert "
                "again with --height and --width for another size"
            )


def _noise(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | None, rng: str
) -> noises.Noise:
    if generator is not None and seed is not None:
        raise InputError("generator and seed are both given: give one")
    if generator is not None:
        return noises.from_generators(generator)
    return noises.from_seeds([noises.fresh_seed() if seed is None else seed], rng)


def _texts(prompt: Texts, negative: Texts | None, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One prompt and one negative prompt per picture."""
    if count < 1:
        raise InputError(f"{count} pictures per prompt: expected at least 1")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError("no prompt: expected a text or a list of texts (an empty text is allowed)")
    one = negative is None or isinstance(negative, str)
    negatives: list[str] = [str(negative or "")] * len(prompts) if one else list(negative or ())
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
    return _repeated(prompts, count), _repeated(negatives, count)


def _repeated(texts: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(text for text in texts for _ in range(count))


def _strength(strength: float | None, task: tasks.Task) -> float:
    if strength is None:
        return 1.0 if "mask" in task.needs else 0.8
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise InputError(f"strength {strength}: expected more than 0 (no change) and at most 1 (a new picture)")
    return strength


def with_scheduler(pipeline: Pipeline, name: str | None) -> Pipeline:
    """The same pipeline with another scheduler. Raises InputError for an unknown one."""
    return replace(pipeline, scheduler_name=None if name is None else schedulers.canonical(name))
