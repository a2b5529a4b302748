"""Converted models inside diffusers' own pipelines.

    from diffusion_runtime.diffusers import load_diffusers_pipeline

    pipe = load_diffusers_pipeline("models")
    pipe("a large red circle on a white background", num_inference_steps=25).images[0]

Callbacks, schedulers, prompt weighting libraries and community pipelines work as far as they call the parts and do
not look into them. This package imports diffusers and transformers at once; the rest of the runtime does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import diffusers
from transformers import CLIPImageProcessor, DPTImageProcessor

from diffusion_runtime import Pipeline, load_pipeline, schedulers
from diffusion_runtime.added_conditions import WITH_SCORE
from diffusion_runtime.backends import ComputeUnits
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.diffusers.parts import (
    CoreMLDepthEstimator,
    CoreMLSafetyChecker,
    CoreMLTextEncoder,
    CoreMLUNet,
    CoreMLVAE,
)
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import UNETS
from diffusion_runtime.models import Models, Timed

__all__ = [
    "CoreMLDepthEstimator",
    "CoreMLSafetyChecker",
    "CoreMLTextEncoder",
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


def load_diffusers_pipeline(
    path: str | PathLike[str],
    task: str | None = None,
    backend: str = "auto",
    compute_units: ComputeUnits | str | None = None,
    **options: Any,
) -> Any:
    """diffusers' own pipeline class for the models at ``path``, with the bundle's tokenizer and scheduler, in which
    UNet, VAE, text encoder, safety checker and depth estimator are the converted models.

    ``task``: "text-to-image" (default), "image-to-image" or "inpainting"; None for models with one task, as those
    for in-painting, depth and upscaling.
    ``backend``, ``compute_units`` and ``options`` are those of `diffusion_runtime.load_pipeline`.
    Pictures have the size that the models were converted for. Raises InputError for a task that these models cannot
    do, and as `load_pipeline` does; in use, for other sizes, gradients, and devices other than the CPU's."""
    ours = load_pipeline(path, backend, compute_units, **options)
    manifest, models = ours.manifest, ours.models
    name = next(one for one in UNETS if one in manifest.components)
    shapes = {tensor.name: tensor.shape for tensor in manifest.components[name].inputs}
    kind = _pipeline_class(shapes, task)
    parts: dict[str, Any] = {
        **_text_parts(ours, shapes),
        "unet": CoreMLUNet(models[name], _unet_config(manifest, shapes, kind.__name__)),
        "vae": _vae(models, manifest),
        "scheduler": schedulers.build(
            {**manifest.scheduler, "prediction_type": manifest.prediction_type}, ours.scheduler_name
        ),
    }
    if "text_embeds" in shapes:
        parts |= _xl_settings(manifest, shapes, kind)
    elif kind is diffusers.StableDiffusionDepth2ImgPipeline:
        estimator = _optional(models, "depth_estimator")
        parts["depth_estimator"] = None if estimator is None else CoreMLDepthEstimator(estimator, {})
        parts["feature_extractor"] = DPTImageProcessor(
            size={"height": _side(estimator), "width": _side(estimator)},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            # Bicubic in Pillow's numbers: as stabilityai's stable-diffusion-2-depth has it.
            resample=3,
        )
    elif kind is diffusers.StableDiffusionUpscalePipeline:
        if manifest.noise_scheduler is None:
            raise InputError(f"{path}: the manifest has no noise_scheduler, which upscaling needs")
        parts["low_res_scheduler"] = schedulers.build(manifest.noise_scheduler)
    else:
        checks = ours.check_safety and "safety_checker" in models
        parts["safety_checker"] = CoreMLSafetyChecker(models["safety_checker"], {}) if checks else None
        parts["feature_extractor"] = CLIPImageProcessor() if checks else None
        parts["requires_safety_checker"] = checks
    return kind(**parts)


def _text_parts(ours: Pipeline, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tokenizers and text encoders by diffusers' names: two for SDXL, of which its refiner has the second alone."""
    first, second = (name in ours.models for name in ("text_encoder", "text_encoder_2"))
    if not second:
        config = {"use_attention_mask": False, "projects": False}
        return {
            "tokenizer": ours.tokenizer.clip,
            "text_encoder": CoreMLTextEncoder(ours.models["text_encoder"], config),
        }
    projection = {"projects": True, "projection_dim": shapes["text_embeds"][1]}
    tokenizer_2 = ours.tokenizer_2 or ours.tokenizer
    return {
        "tokenizer": ours.tokenizer.clip if first else None,
        "text_encoder": CoreMLTextEncoder(ours.models["text_encoder"], {"projects": False}) if first else None,
        "tokenizer_2": tokenizer_2.clip,
        "text_encoder_2": CoreMLTextEncoder(ours.models["text_encoder_2"], projection),
    }


def _xl_settings(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], kind: Any) -> dict[str, Any]:
    """What SDXL's pipelines are told beside their parts."""
    told: dict[str, Any] = {"force_zeros_for_empty_prompt": manifest.force_zeros_for_empty_prompt}
    if kind is diffusers.StableDiffusionXLInstructPix2PixPipeline:
        told["is_cosxl_edit"] = manifest.scales_image_latents
    elif kind is not diffusers.StableDiffusionXLPipeline:
        told["requires_aesthetics_score"] = shapes["time_ids"][1] == WITH_SCORE
    return {**told, "add_watermarker": False}


def _pipeline_class(shapes: Mapping[str, tuple[int, ...]], task: str | None) -> Any:
    channels = shapes["sample"][1]
    table = XL_PIPELINES if "text_embeds" in shapes else PIPELINES
    able = {name: kind for (count, name), kind in table.items() if count == channels}
    if "time_ids" in shapes and shapes["time_ids"][1] == WITH_SCORE:  # a refiner goes on from what is there
        able = {"image-to-image": diffusers.StableDiffusionXLImg2ImgPipeline}
    if not able:
        raise InputError(f"the UNet takes {channels} channels: no pipeline of diffusers is known for it")
    if task is not None and task not in able:
        raise InputError(f"task {task!r}: these models can do {', '.join(able)}")
    return able[task] if task is not None else next(iter(able.values()))


def _unet_config(manifest: Manifest, shapes: dict[str, tuple[int, ...]], class_name: str) -> dict[str, Any]:
    """What diffusers' pipelines read of a UNet's configuration. All but one class compute with its size as with a
    number: where pictures are not square, they must be told height and width, or take those of a picture."""
    condition = shapes.get("timestep_cond")
    height, width = shapes["sample"][2:]
    added = {"addition_time_embed_dim": 1} if "time_ids" in shapes else {}  # see `CoreMLUNet`
    return {
        **added,
        "cross_attention_dim": shapes["encoder_hidden_states"][1],
        "in_channels": shapes["sample"][1],
        "out_channels": manifest.latents.channels,
        "sample_size": (height, width)
        if height != width and class_name == "StableDiffusionPipeline"
        else max(height, width),
        "time_cond_proj_dim": condition[1] if condition else None,
    }


def _vae(models: Models, manifest: Manifest) -> CoreMLVAE:
    return CoreMLVAE(models["vae_decoder"], _optional(models, "vae_encoder"), manifest.latents)


def _optional(models: Models, name: str) -> Timed | None:
    return models[name] if name in models else None  # noqa: SIM401 (no mapping: it loads)


def _side(estimator: Any) -> int:
    """The height and width in pixels that a depth estimator takes; DPT's if there is no depth estimator."""
    return 384 if estimator is None else int(next(iter(estimator.inputs.values())).shape[-1])
