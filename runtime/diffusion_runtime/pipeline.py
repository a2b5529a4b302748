"""Prompt to picture: encode, denoise, decode, check. No files, no backends: models are callables, pictures values.

    run = pipeline.prepare(Request(("a red circle",)), from_seeds([1]))
    for step in pipeline.denoise(run):      # progress, previews; leaving the loop cancels
        print(step.index, step.total)
    pictures = pipeline.finish(run, step.latents).images

`Pipeline.__call__` is these three in one, with the argument names of diffusers' pipelines.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from PIL import Image

from diffusion_runtime import (
    callbacks,
    decoding,
    defaults,
    denoising,
    guidance,
    images,
    picture_prompts,
    schedulers,
    stages,
    t2i_adapters,
    tasks,
    unet_inputs,
)
from diffusion_runtime.added_conditions import SizeConditioning
from diffusion_runtime.arguments import (
    RENAMED,
    AdapterArguments,
    Arguments,
    ControlArguments,
    NoiseArguments,
    PicturePromptArguments,
    RequestArguments,
    Result,
    SizeArguments,
    StepArguments,
    Texts,
    as_output_type,
    check_output_type,
    controls_of,
    noise_of,
    taken,
    texts_of,
)
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.bundle.views import of_refiner
from diffusion_runtime.control import plan
from diffusion_runtime.denoising import Step
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import T5, TEXT_ENCODERS, UNETS, family_named
from diffusion_runtime.models import Models
from diffusion_runtime.noise import Noise
from diffusion_runtime.picture_size import Size
from diffusion_runtime.prompt.text_states import TextStates
from diffusion_runtime.prompt.tokenizer import Tokenizer
from diffusion_runtime.stages import Run
from diffusion_runtime.tasks import Request


class RuntimeNote(UserWarning):
    """Something the caller should know: a prompt that was cut, a picture that was resized."""


@dataclass(slots=True, eq=False)
class Pipeline:
    """The models of one bundle.

    ``scheduler_name`` None is the checkpoint's own scheduler; ``check_safety`` uses the safety checker where there
    is one. ``notes`` say what was chosen or assumed when the models were opened."""

    manifest: Manifest
    models: Models
    tokenizer: Tokenizer
    scheduler_name: str | None = None
    check_safety: bool = True
    notes: tuple[str, ...] = ()
    tokenizer_2: Tokenizer | None = None
    tokenizer_3: Tokenizer | None = None
    _scheduler: tuple[str | None, Any] | None = field(default=None, init=False, repr=False)
    _is_set: bool = field(default=False, init=False, repr=False)

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers that every run gets a copy of. As in diffusers, another can be set:
        ``pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)``. It is used as it
        is. Raises InputError for what is no scheduler of diffusers."""
        if self._scheduler is None or self._scheduler[0] != self.scheduler_name:
            config = {**self.manifest.scheduler, "prediction_type": self.manifest.prediction_type}
            schedulers.check_family(config, self.manifest.family)
            imposed = schedulers.imposed_on(self.manifest.family, self._takes_guidance)
            self._scheduler = self.scheduler_name, schedulers.build(config, self.scheduler_name, imposed)
            self._is_set = False
        return self._scheduler[1]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        schedulers.check(scheduler, self.manifest.scheduler)
        self._scheduler, self._is_set = (self.scheduler_name, scheduler), True

    @property
    def refiner(self) -> Pipeline | None:
        """The refiner that lies beside an SDXL base, as a pipeline of its own on the same models."""
        described = of_refiner(self.manifest)
        if described is None:
            return None
        models = self.models.known_as({name: name for name in described.components} | {"unet": "refiner"})
        clip = self.tokenizer_2 or self.tokenizer
        return replace(self, manifest=described, models=models, tokenizer=clip, tokenizer_2=None)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        height, width = self._unet_shapes()["sample"][2:]
        return height * self.manifest.latents.factor, width * self.manifest.latents.factor

    @property
    def channels(self) -> int:
        """How many the UNet takes, which says what it can be used for (`tasks`)."""
        return self._unet_shapes()["sample"][1]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes that the models make, width before height; the first is `size`."""
        return self.manifest.sizes

    def at(self, height: int | None, width: int | None) -> Pipeline:
        """The pipeline for pictures of that size, on the same models; None: the first size's. Raises InputError,
        with the sizes that there are, for another."""
        own = Size(self.size[1], self.size[0])
        size = Size(own.width if width is None else width, own.height if height is None else height)
        if size == own:
            return self
        described, models = stages.of_size(self.manifest, self.models, size)
        made = replace(self, manifest=described, models=models)
        made._scheduler, made._is_set = (self.scheduler_name, self.scheduler), self._is_set
        return made

    @property
    def batch_size(self) -> int:
        """How many rows the UNet takes in one call."""
        return self._unet_shapes()["sample"][0]

    def check_clip_skip(self, asked: int | None) -> None:
        """Raise InputError for another clip skip than these models were converted with."""
        own = self.manifest.clip_skip
        if asked is not None and asked != own:
            raise InputError(
                f"clip skip {asked!r}: it is part of the models, and these were converted with {own}: convert "
                f"again with --clip-skip {asked}"
            )

    def prewarm(self) -> None:
        """Load every model that a prompt alone needs and run it once, so that the first picture takes no longer
        than the next. Loads what `reduce_memory` would free, so it is of no use with that."""
        needed = [*(name for name in (*TEXT_ENCODERS, T5) if name in self.models), self._unet, "vae_decoder"]
        checks = ["safety_checker"] if self.check_safety and "safety_checker" in self.models else []
        self.models.prewarm(needed + checks)

    @overload
    def __call__(
        self, prompt: Texts, *, output_type: Literal["pil"] = "pil", **arguments: Unpack[Arguments]
    ) -> Result[list[Image.Image]]: ...

    @overload
    def __call__(
        self, prompt: Texts, *, output_type: Literal["np"], **arguments: Unpack[Arguments]
    ) -> Result[np.ndarray]: ...

    @overload
    def __call__(
        self, prompt: Texts, *, output_type: Literal["pt", "latent"], **arguments: Unpack[Arguments]
    ) -> Result[torch.Tensor]: ...

    def __call__(
        self, prompt: Texts | None = None, *, output_type: str = "pil", **arguments: Unpack[Arguments]
    ) -> Result[Any]:
        """Make pictures. Names and defaults are those of diffusers' pipelines, where they have the argument.

        Args:
            prompt: what to draw, one text or several; "(word:1.3)" draws more attention to word.
            output_type: "pil", "np", "pt" or "latent", see `Result`.
            negative_prompt: what not to draw, one for all prompts or one for each. Needs a guidance scale above 1.
            image: to start from, paint in or enlarge; resized where its size is not the models'. Latents with
                ``denoising_start``.
            mask_image: white where ``image`` is painted anew.
            depth_map: depth of ``image``, brighter (or larger) is nearer: a picture, or (…, height, width) float32.
            height, width: in pixels; None: the first of `sizes`, and others than those cannot be made.
            num_inference_steps: denoising steps, 1 to the scheduler's number of training steps. None: as many as
                diffusers' pipeline for these models takes, mostly 50.
            guidance_scale: how closely to follow the prompt; 1 or less: no guidance. None: 7.5; 5 for SDXL, 7.5
                with its mask; 8.5 for latent consistency models, which take it as an input.
            image_guidance_scale: how closely to follow ``image``, for models that edit it; None: 1.5.
            strength: how much of ``image`` may change, above 0 to 1; None: 0.8, and 1 with a mask; 0.3 and 0.9999
                for SDXL.
            noise_level: upscaling: the noise that is put on ``image``, 0 to 350; None: 20.
            num_images_per_prompt: pictures of each prompt; 1 unless given.
            eta: the share of fresh noise in every step of a DDIM scheduler, 0 (unless given) to 1.
            generator: torch's, one for all pictures or one for each.
            seed: stands for a generator, 0 to 2^64-1; one for all pictures or one for each. None: a random one.
            rng: what ``seed`` is for: "torch" (as diffusers; unless given), "numpy" (Apple's client's) or "nvidia".
            latents: noise to start from, (pictures, channels, height, width) of latents.
            long_prompt: refuse a prompt that is too long for the models, rather than cut it.
            denoising_start: the part of the steps that another model has done, whose latents are ``image``.
            denoising_end: the part of the steps after which another model goes on; ask for "latent" output.
            refiner_start: the part of the steps after which the refiner goes on that was converted with the base,
                as 0.8: what ``denoising_end`` and ``denoising_start`` do with two pipelines. None: no refiner.
            ip_adapter_image: to draw after, through IP-Adapters (`convert --ip-adapter`): a picture, or one for
                each adapter in their order, None for one that is not used; a list of several for one adapter.
            ip_adapter_image_embeds: in its place, what diffusers' `prepare_ip_adapter_image_embeds` gives.
            ip_adapter_scale: how much of it, for all adapters or for each, as diffusers' `set_ip_adapter_scale`
                has it. None: 1.
            on_step: called after each step; raise in it to cancel.
            callback_on_step_end: diffusers' callback: it may give other latents, or set ``_interrupt``.
            callback_on_step_end_tensor_inputs: what that callback is given; only "latents" can be had.
            original_size, crops_coords_top_left, target_size: what SDXL's UNets are told of the picture: (height,
                width), (top, left) and (height, width) in pixels; None: its own size.
            negative_original_size, negative_crops_coords_top_left, negative_target_size: of the negative prompt.
            aesthetic_score, negative_aesthetic_score: what SDXL's refiner is told, usually 0 to 10.
            control_image: a picture for a ControlNet, of the pictures' size, or one for each of several.
            controlnet: the names of their ControlNets; None: the only one that there is.
            controlnet_conditioning_scale, control_guidance_start, control_guidance_end: how strongly they steer,
                and in which part of the steps, 0 to 1; one for all or one for each. A scale of None: as diffusers',
                1; 0.8 with ``image``; 0.5 with a mask (1 for SDXL).
            control_prepare: how the pictures are made of those given: "canny", "depth", "tile"; None: not at all.
            guess_mode: ControlNets steer the prompt's half of the guidance alone.
            adapter_image: a picture for a T2I-Adapter (`convert --t2i-adapter`), or one for each of several.
            adapter: the names of their T2I-Adapters; None: in the models' order.
            adapter_conditioning_scale: how strongly they steer, one for all or one for each.
            adapter_conditioning_factor: in which first part of the steps, 0 to 1.
            clip_skip: that of the models' conversion: another one is refused.

        Arguments of diffusers that can do nothing here (`callbacks.Neutral`) are taken where they change nothing.

        Returns:
            One picture for each prompt and repetition. What the safety checker flags is black.

        Raises:
            InputError: for what cannot be used.
            DiffusionError: where a model computes NaN.

        Notes for the user are issued as `RuntimeNote` warnings."""
        given: dict[str, Any] = {**arguments}
        self.check_clip_skip(given.pop("clip_skip", None))
        negative, count = given.pop("negative_prompt", None), given.pop("num_images_per_prompt", 1)
        steered, adapted = taken(given, ControlArguments), taken(given, AdapterArguments)
        sizes, pictured = SizeConditioning(**taken(given, SizeArguments)), taken(given, PicturePromptArguments)
        drawn, told, asked = (taken(given, kind) for kind in (NoiseArguments, StepArguments, RequestArguments))
        image = given.pop("image", None)
        callbacks.refuse(given)
        check_output_type(output_type)
        if isinstance(image, torch.Tensor):
            asked["latents"] = image
        else:
            asked["image"] = image
        prompts, negatives = texts_of(prompt, negative, count)
        request = Request(
            prompts,
            negatives,
            **{RENAMED.get(name, name): value for name, value in asked.items()},
            picture_prompts=picture_prompts.of_arguments(pictured),
            sizes=sizes,
            controls=controls_of(steered, plan.names(self.manifest)),
            guess_mode=steered.get("guess_mode", False),
            adapters=t2i_adapters.of_arguments(adapted, self.manifest),
        )
        run = self.prepare(request, noise_of(**drawn))
        handle = callbacks.Handle(self, run.job.scheduler, run.total, run.job.request.scale)
        start = replace(run.start, timesteps=run.timesteps)
        finished = callbacks.run_steps(handle, self.denoise(run), start, **told)
        result = self.finish(run, finished, output_type)
        for note in result.notes:
            warnings.warn(note, RuntimeNote, stacklevel=2)
        return result

    def prepare(self, request: Request, noise: Noise) -> Run:
        """Check everything, then encode the prompts and whatever else the task needs.

        Raises InputError for what these models cannot do, before any of them runs."""
        if (own := self.at(request.height, request.width)) is not self:
            return own.prepare(request, noise)
        unet = self._unet_shapes()
        request, refined = stages.apart(request)
        task = tasks.choose(tasks.kind(unet["sample"][1], self.manifest.latents.channels), request.given)
        request = self.settled(t2i_adapters.named(plan.named(request, self.manifest), self.manifest))
        scheduler = stages.scheduler(
            self.manifest, self.scheduler_name, self.scheduler, self._is_set, request, task
        )
        height, width = unet["sample"][2:]
        patch_size = family_named(self.manifest.family).denoiser.patch_size
        patches = (height // patch_size) * (width // patch_size)
        schedulers.set_steps(scheduler, request.step_count, patches)
        job = tasks.Job(request, self.manifest, self.models, (height, width), scheduler, noise)
        task.check(job)
        guided = self.is_guided(request)
        picture_prompts.check(self.manifest, self.models, request.picture_prompts, guided, unet)
        controls = plan.planned(job)
        refiner = None if refined is None else self._refiners(refined, job)
        tokenizers = (self.tokenizer, *([self.tokenizer_2] if self.tokenizer_2 else []))
        _, width_of_states, _, length = unet[unet_inputs.STATES]
        given = self.tokenizer_3, request.long_prompt
        texts = TextStates(self.models, tokenizers, self.manifest, length, width_of_states, *given)
        encoded = texts.encode(request.texts(guided), request.blind(guided))
        job.notes.extend(encoded.notes)
        prepared = task.prepare(job)
        labels = {name: torch.full((len(encoded.states),), value) for name, value in prepared.labels.items()}
        told = {unet_inputs.STATES: encoded.states, **labels}
        told |= unet_inputs.of_rows(job, unet, encoded.pooled, guided)
        steers = plan.steers(controls, job, prepared.start)
        whole = unet_inputs.whole(job, unet, len(prepared.start.timesteps))
        conditions = guidance.Conditions(told, prepared.channels, whole, steers)
        return Run(job, task, prepared.start, conditions, refiner)

    def _refiners(self, request: Request, job: tasks.Job) -> Run:
        """The refiner's run, with zeros in place of the latents that the base has not made yet."""
        refiner = self.refiner
        if refiner is None:
            raise InputError("refiner_start: these models have no refiner: convert SDXL with --refiner SOURCE")
        return refiner.prepare(replace(request, latents=torch.zeros(job.latent_shape)), job.noise)

    def settled(self, request: Request) -> Request:
        """The request with the defaults of diffusers' pipeline for these models filled in."""
        return defaults.settled(request, family_named(self.manifest.family), self._takes_guidance)

    def is_guided(self, request: Request) -> bool:
        """Whether each picture needs several rows of the UNet's work. A UNet that takes the scale as an input needs
        one."""
        asked = self.settled(request)
        return guidance.is_guided(asked.scale, asked.image_guidance_scale) and not self._takes_guidance

    @property
    def _takes_guidance(self) -> bool:
        return guidance.EMBEDDED in self._unet_shapes()

    def denoise(self, run: Run) -> Generator[Step, torch.Tensor | None, None]:
        """Yield after every step of a prepared run; a run can be used once. Latents that are sent back replace the
        step's. A refiner's steps follow the others."""
        refiner = self.refiner
        if run.refiner is None or refiner is None:
            yield from self._denoise(run)
            return
        latents = yield from stages.renumbered(self._denoise(run), run.start.latents, 0, run.total)
        goes_on = replace(run.refiner, start=replace(run.refiner.start, latents=latents))
        yield from stages.renumbered(refiner.denoise(goes_on), latents, len(run.start.timesteps), run.total)

    def _denoise(self, run: Run) -> Generator[Step, torch.Tensor | None, None]:
        job, request = run.job, run.job.request
        steers = run.conditions.steers
        used = [plan.UNET if steers else self._unet, *(steer.component for steer in steers)]
        unet, *controlnets = (job.models[name] for name in used)  # of the size that was prepared
        scale = request.scale if self.is_guided(request) else 1.0
        by_image = request.image_guidance_scale
        predict = guidance.predictor(unet, request.pictures, run.conditions, scale, by_image, controlnets)
        try:
            yield from denoising.denoise(predict, job.scheduler, run.start, job.noise, request.eta)
        finally:
            job.models.release(*used)

    def finish(self, run: Run, latents: torch.Tensor, output_type: str = "pil") -> Result[Any]:
        """Decode and check what the last step gave. A flagged picture is wholly black."""
        if output_type == "latent":
            return Result(latents, None, run.notes)
        arrays, flags = decoding.checked(self._of(latents).models, self.decode(latents), self.check_safety)
        return Result(as_output_type(arrays, output_type), flags, run.notes)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, channels, height, width) to pictures (n, 3, height, width) in about -1..1."""
        return decoding.decode(self._of(latents).models, self.manifest.latents, latents)

    def _of(self, latents: torch.Tensor) -> Pipeline:
        """The pipeline for pictures of the latents' size, where there are several sizes."""
        factor = self.manifest.latents.factor
        return self.at(*(size * factor for size in latents.shape[2:])) if len(self.sizes) > 1 else self

    def preview(self, step: Step, index: int = 0) -> Image.Image:
        """The picture as it will be, judged from this step: one call of the decoder (of that for previews, where
        there is one), and one of the safety checker where it is used. A flagged one is black, as the picture."""
        latents = step.preview()[index : index + 1]
        models = self._of(latents).models
        decoder = decoding.OF_PREVIEWS if decoding.OF_PREVIEWS in models else decoding.DECODER
        decoded = decoding.decode(models, self.manifest.latents, latents, decoder)
        arrays, _ = decoding.checked(models, decoded, self.check_safety)
        return images.to_pil(arrays)[0]

    @property
    def _unet(self) -> str:
        """The UNet's component: one that is steered draws without ControlNets, too."""
        return next((name for name in UNETS if name in self.models), "unet")

    def _unet_shapes(self) -> dict[str, tuple[int, ...]]:
        """The UNet's inputs, from the manifest where it lists them: a UNet need not be loaded for that."""
        return unet_inputs.shapes(self.manifest, lambda: self.models[self._unet])
