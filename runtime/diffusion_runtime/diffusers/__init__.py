"""Converted models inside diffusers' own pipelines.

    from diffusion_runtime.diffusers import load_diffusers_pipeline

    pipe = load_diffusers_pipeline("models")
    pipe("a large red circle on a white background", num_inference_steps=25).images[0]

Callbacks, schedulers, prompt weighting libraries and community pipelines work as far as they call the parts and do
not look into them. This package imports diffusers and transformers at once; the rest of the runtime does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import diffusers
from transformers import CLIPImageProcessor, DPTImageProcessor

from diffusion_runtime import Pipeline, load_pipeline, schedulers
from diffusion_runtime.added_conditions import WITH_SCORE
from diffusion_runtime.backends import ComputeUnits
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.control import chosen, plan
from diffusion_runtime.diffusers.parts import (
    CoreMLControlNet,
    CoreMLDepthEstimator,
    CoreMLSafetyChecker,
    CoreMLTextEncoder,
    CoreMLTransformer,
    CoreMLUNet,
    CoreMLVAE,
)
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import MMDIT, T5, TEXT_ENCODERS, UNETS, several
from diffusion_runtime.models import Models, Timed
from diffusion_runtime.prompt.tokenizer import LENGTH
from diffusion_runtime.unet_inputs import STATES

__all__ = [
    "CoreMLControlNet",
    "CoreMLDepthEstimator",
    "CoreMLSafetyChecker",
    "CoreMLTextEncoder",
    "CoreMLTransformer",
    "CoreMLUNet",
    "CoreMLVAE",
    "load_diffusers_pipeline",
]

PIPELINES = {
    (4, "text-to-image"): diffusers.StableDiffusionPipeline,
    (4, "image-to-image"): diffusers.StableDiffusionImg2ImgPipeline,
    (4, "inpainting"): diffusers.StableDiffusionInpaintPipeline,
    (5, "image-to-image"): diffusers.StableDiffusionDepth2ImgPipeline,
    (7, "upscaling"): diffusers.StableDiffusionUpscalePipeline,
    (8, "editing"): diffusers.StableDiffusionInstructPix2PixPipeline,
    (9, "inpainting"): diffusers.StableDiffusionInpaintPipeline,
}
"""By the UNet's input channels and the task. The first of a number of channels is what is loaded unless asked."""
XL_PIPELINES = {
    (4, "text-to-image"): diffusers.StableDiffusionXLPipeline,
    (4, "image-to-image"): diffusers.StableDiffusionXLImg2ImgPipeline,
    (4, "inpainting"): diffusers.StableDiffusionXLInpaintPipeline,
    (8, "editing"): diffusers.StableDiffusionXLInstructPix2PixPipeline,
    (9, "inpainting"): diffusers.StableDiffusionXLInpaintPipeline,
}
"""The same of UNets that take time_ids and text_embeds."""


SD3_PIPELINES = {
    (16, "text-to-image"): diffusers.StableDiffusion3Pipeline,
    (16, "image-to-image"): diffusers.StableDiffusion3Img2ImgPipeline,
    (16, "inpainting"): diffusers.StableDiffusion3InpaintPipeline,
}
"""The same of Stable Diffusion 3's transformer."""
CONTROLLED = {
    diffusers.StableDiffusionPipeline: diffusers.StableDiffusionControlNetPipeline,
    diffusers.StableDiffusionImg2ImgPipeline: diffusers.StableDiffusionControlNetImg2ImgPipeline,
    diffusers.StableDiffusionInpaintPipeline: diffusers.StableDiffusionControlNetInpaintPipeline,
    diffusers.StableDiffusionXLPipeline: diffusers.StableDiffusionXLControlNetPipeline,
    diffusers.StableDiffusionXLImg2ImgPipeline: diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    diffusers.StableDiffusionXLInpaintPipeline: diffusers.StableDiffusionXLControlNetInpaintPipeline,
}
"""What each class becomes with ControlNets."""
Shapes = Mapping[str, tuple[int, ...]]


def load_diffusers_pipeline(
    path: str | PathLike[str],
    task: str | None = None,
    backend: str = "auto",
    compute_units: ComputeUnits | str | None = None,
    controlnet: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> Any:
    """diffusers' own pipeline class for the models at ``path``, with the bundle's tokenizer and scheduler, in which
    the networks are the converted models.

    ``task``: "text-to-image" (default), "image-to-image" or "inpainting"; None for models with one task, as those
    for in-painting, depth and upscaling.
    ``controlnet``: the name of a ControlNet among the models, or a part that says which, or several names: the
    class is then that for ControlNets.
    ``height``, ``width``: of models of several sizes, that of the pictures; None: their first one's.
    ``backend``, ``compute_units`` and ``options`` are those of `diffusion_runtime.load_pipeline`.
    Pictures have a size that the models were converted for, and Stable Diffusion 3 the ``max_sequence_length``.
    Raises InputError for a task that these models cannot do, and as `load_pipeline` does; in use, for other sizes,
    gradients, and devices other than the CPU's."""
    ours = load_pipeline(path, backend, compute_units, **options).at(height, width)
    manifest, models = ours.manifest, ours.models
    steered = _controlnets(ours, [controlnet] if isinstance(controlnet, str) else controlnet or ())
    name = plan.UNET if steered else next(one for one in UNETS if one in manifest.components)
    shapes = {tensor.name: tensor.shape for tensor in manifest.components[name].inputs}
    kind = _pipeline_class(shapes, task)
    if steered and kind not in CONTROLLED:
        raise InputError(f"controlnet: diffusers has no {kind.__name__} with ControlNets; leave it out")
    kind = CONTROLLED[kind] if steered else kind
    config = _unet_config(manifest, shapes, kind.__name__)
    tokens = f"give max_sequence_length={shapes[STATES][-1] - LENGTH}, as converted; --context-length makes others"
    parts: dict[str, Any] = {
        **_text_parts(ours, shapes, tokens),
        **({"controlnet": steered[0] if isinstance(controlnet, str) else steered} if steered else {}),
        "unet": CoreMLUNet(models[name], config),
        "transformer": CoreMLTransformer(models[name], config, tokens),
        "vae": CoreMLVAE(models["vae_decoder"], _optional(models, "vae_encoder"), manifest.latents),
        "scheduler": schedulers.build(
            {**manifest.scheduler, "prediction_type": manifest.prediction_type}, ours.scheduler_name
        ),
        "force_zeros_for_empty_prompt": manifest.force_zeros_for_empty_prompt,
        "is_cosxl_edit": manifest.scales_image_latents,
        "requires_aesthetics_score": shapes.get("time_ids", (0, 0))[1] == WITH_SCORE,
        "add_watermarker": False,
        **_checking_parts(ours, kind),
    }
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{name: part for name, part in parts.items() if name in taken})


def _controlnets(ours: Pipeline, names: Sequence[str]) -> list[CoreMLControlNet]:
    known = several(plan.KIND, ours.manifest.components)
    found = [chosen(name, list(known)) for name in names]
    pools = {
        name: {"global_pool_conditions": told.global_pool_conditions}
        for name, told in ours.manifest.controlnets.items()
    }
    plain = {"global_pool_conditions": False}
    return [CoreMLControlNet(ours.models[known[name]], pools.get(name, plain)) for name in found]


def _checking_parts(ours: Pipeline, kind: Any) -> dict[str, Any]:
    """What looks at pictures, and what an upscaler does to them."""
    models = ours.models
    if kind is diffusers.StableDiffusionDepth2ImgPipeline:
        estimator = _optional(models, "depth_estimator")
        side = _side(estimator)
        return {
            "depth_estimator": None if estimator is None else CoreMLDepthEstimator(estimator, {}),
            # Bicubic in Pillow's numbers: as stabilityai's stable-diffusion-2-depth has it.
            "feature_extractor": DPTImageProcessor(
                size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
            ),
        }
    if kind is diffusers.StableDiffusionUpscalePipeline:
        if ours.manifest.noise_scheduler is None:
            raise InputError("the manifest has no noise_scheduler, which upscaling needs")
        return {"low_res_scheduler": schedulers.build(ours.manifest.noise_scheduler)}
    checks = ours.check_safety and "safety_checker" in models
    return {
        "safety_checker": CoreMLSafetyChecker(models["safety_checker"], {}) if checks else None,
        "feature_extractor": CLIPImageProcessor() if checks else None,
        "requires_safety_checker": checks,
    }


def _text_parts(ours: Pipeline, shapes: Shapes, tokens: str) -> dict[str, Any]:
    """Tokenizers and text encoders by diffusers' names: two for SDXL, of which its refiner has the second alone,
    and two or three for Stable Diffusion 3. ``tokens``: what to do about texts of another length."""
    first, second, third = (name in ours.models for name in (*TEXT_ENCODERS, T5))
    if not second:
        config = {"use_attention_mask": False, "projects": False}
        return {
            "tokenizer": ours.tokenizer.clip,
            "text_encoder": CoreMLTextEncoder(ours.models["text_encoder"], config),
        }
    projection = {"projects": True, "projection_dim": shapes["text_embeds"][1]}
    config = {"projects": "time_ids" not in shapes}  # Stable Diffusion 3 takes both pooled texts
    tokenizer_2, tokenizer_3 = ours.tokenizer_2 or ours.tokenizer, ours.tokenizer_3
    return {
        "tokenizer": ours.tokenizer.clip if first else None,
        "text_encoder": CoreMLTextEncoder(ours.models["text_encoder"], config) if first else None,
        "tokenizer_2": tokenizer_2.clip,
        "text_encoder_2": CoreMLTextEncoder(ours.models["text_encoder_2"], projection),
        "tokenizer_3": tokenizer_3.clip if tokenizer_3 else None,
        "text_encoder_3": CoreMLTextEncoder(ours.models[T5], {"projects": False}, tokens) if third else None,
    }


def _pipeline_class(shapes: Shapes, task: str | None) -> Any:
    channels = shapes["sample"][1]
    table = XL_PIPELINES if "time_ids" in shapes else SD3_PIPELINES if "text_embeds" in shapes else PIPELINES
    able = {name: kind for (count, name), kind in table.items() if count == channels}
    if "time_ids" in shapes and shapes["time_ids"][1] == WITH_SCORE:  # a refiner goes on from what is there
        able = {"image-to-image": diffusers.StableDiffusionXLImg2ImgPipeline}
    if not able:
        raise InputError(f"the UNet takes {channels} channels: no pipeline of diffusers is known for it")
    if task is not None and task not in able:
        raise InputError(f"task {task!r}: these models can do {', '.join(able)}")
    return able[task] if task is not None else next(iter(able.values()))


def _unet_config(manifest: Manifest, shapes: Shapes, class_name: str) -> dict[str, Any]:
    """What diffusers' pipelines read of a UNet's configuration. All but one class compute with its size as with a
    number: where pictures are not square, they must be told height and width, or take those of a picture."""
    condition = shapes.get("timestep_cond")
    height, width = shapes["sample"][2:]
    added = {"addition_time_embed_dim": 1} if "time_ids" in shapes else {}  # see `CoreMLUNet`
    return {
        **added,
        "cross_attention_dim": shapes[STATES][1],
        "joint_attention_dim": shapes[STATES][1],
        "patch_size": MMDIT.patch_size,
        "in_channels": shapes["sample"][1],
        "out_channels": manifest.latents.channels,
        "sample_size": (height, width)
        if height != width and class_name == "StableDiffusionPipeline"
        else max(height, width),
        "time_cond_proj_dim": condition[1] if condition else None,
    }


def _optional(models: Models, name: str) -> Timed | None:
    return models[name] if name in models else None  # noqa: SIM401 (no mapping: it loads)


def _side(estimator: Any) -> int:
    """The height and width in pixels that a depth estimator takes; DPT's if there is no depth estimator."""
    return 384 if estimator is None else int(next(iter(estimator.inputs.values())).shape[-1])
