"""Tiny random checkpoints of every family: the real ones' configuration keys, with widths and depths shrunk.

`build` writes a diffusers folder as `StableDiffusionPipeline.save_pretrained` would, with float16 weights, so that
diffusers' own pipelines load it too. The text encoder's and safety checker's weights carry the names that the
published checkpoints have (``text_model.…``), whatever the installed transformers calls its modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WORDS = ("a", "photo", "of", "an", "astronaut", "riding", "horse", "cat", "red", "circle", "on", "white", "the")

SD1_UNET: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0",  # before 0.9, a sample_size below 64 is read as 64
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "center_input_sample": False,
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SD2_UNET: Mapping[str, Any] = {
    **SD1_UNET,
    "_diffusers_version": "0.10.0",
    "attention_head_dim": [2, 4],
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
UPSCALER_UNET: Mapping[str, Any] = {
    **SD2_UNET,
    "attention_head_dim": 8,
    "block_out_channels": [32, 32, 64],
    "class_embed_type": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, False],
    "resnet_time_scale_shift": "default",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": False,
}
SDXL_UNET: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 8,
    "attention_head_dim": [2, 4, 4],
    "block_out_channels": [32, 64, 64],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 72,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 72,  # 6 time ids of 8, and text_embeds
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 16,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
SDXL_FLAT_UNET: Mapping[str, Any] = {**SDXL_UNET, "transformer_layers_per_block": 1}
"""For kinds that differ from the plain one in what the UNet takes."""
SDXL_REFINER_UNET: Mapping[str, Any] = {
    **SDXL_UNET,
    "attention_head_dim": [2, 4, 4, 4],
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 40,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 64,  # 5 time ids of 8, and text_embeds
    "transformer_layers_per_block": 2,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SD1_TEXT: Mapping[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "projection_dim": 32,
}
SD2_TEXT: Mapping[str, Any] = {**SD1_TEXT, "hidden_act": "gelu", "num_hidden_layers": 3}
SDXL_TEXT_2: Mapping[str, Any] = {
    **SD1_TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_attention_heads": 5,
    "num_hidden_layers": 3,
    "projection_dim": 24,
}
VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.10.0",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 64,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UPSCALER_VAE: Mapping[str, Any] = {
    **VAE,
    "block_out_channels": [32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "sample_size": 32,
    "scaling_factor": 0.08333,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
SDXL_VAE: Mapping[str, Any] = {
    **VAE,
    "_diffusers_version": "0.20.0.dev0",
    "force_upcast": True,
    "sample_size": 128,
    "scaling_factor": 0.13025,
}
SAFETY: Mapping[str, Any] = {
    "architectures": ["StableDiffusionSafetyChecker"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 24,
    "text_config": {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 99,
    },
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 32,
        "image_size": 224,
        "intermediate_size": 64,
        "model_type": "clip_vision_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "projection_dim": 24,
    },
}
DEPTH: Mapping[str, Any] = {
    "architectures": ["DPTForDepthEstimation"],
    "backbone_config": {
        "depths": [1, 1, 2],
        "embedding_dynamic_padding": True,
        "embedding_size": 32,
        "global_padding": "same",
        "hidden_act": "relu",
        "hidden_sizes": [128, 128, 256],
        "layer_type": "bottleneck",
        "model_type": "bit",
        "num_channels": 3,
        "num_groups": 32,
        "out_features": ["stage1", "stage2", "stage3"],
        "output_stride": 32,
        "width_factor": 1,
    },
    "backbone_featmap_shape": [1, 256, 6, 6],
    "backbone_out_indices": [0, 1, 2, 3],
    "fusion_hidden_size": 16,
    "head_in_index": -1,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "image_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "is_hybrid": True,
    "layer_norm_eps": 1e-12,
    "model_type": "dpt",
    "neck_hidden_sizes": [128, 128, 32, 32],
    "neck_ignore_stages": [0, 1],
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "patch_size": 16,
    "qkv_bias": True,
    "readout_type": "project",
    "reassemble_factors": [1, 1, 1, 0.5],
    "use_auxiliary_head": False,
    "use_batch_norm_in_fusion_residual": False,
}
PNDM: Mapping[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.10.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
DDIM_V: Mapping[str, Any] = {**PNDM, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
EULER: Mapping[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
EULER_V_ZERO_SNR: Mapping[str, Any] = {
    **EULER,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
LCM: Mapping[str, Any] = {
    "_class_name": "LCMScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
LOW_RES: Mapping[str, Any] = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.10.0",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
CLIP_IMAGES: Mapping[str, Any] = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
DPT_IMAGES: Mapping[str, Any] = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ensure_multiple_of": 1,
    "feature_extractor_type": "DPTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "keep_aspect_ratio": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 96, "width": 96},
}


@dataclass(frozen=True)
class Recipe:
    """What `build` writes for one family."""

    pipeline: str = "StableDiffusionPipeline"
    unet: Mapping[str, Any] = field(default_factory=lambda: SD1_UNET)
    text: Mapping[str, Any] = field(default_factory=lambda: SD1_TEXT)
    text_2: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] = field(default_factory=lambda: VAE)
    scheduler: Mapping[str, Any] = field(default_factory=lambda: PNDM)
    low_res_scheduler: Mapping[str, Any] | None = None
    safety_checker: bool = False
    depth_estimator: bool = False
    padding: str = "<|endoftext|>"
    index: Mapping[str, Any] = field(default_factory=dict)


_V2 = {"text": SD2_TEXT, "padding": "!"}
_XL: Mapping[str, Any] = {
    "pipeline": "StableDiffusionXLPipeline",
    "unet": SDXL_UNET,
    "text_2": SDXL_TEXT_2,
    "vae": SDXL_VAE,
    "scheduler": EULER,
    "index": {"force_zeros_for_empty_prompt": True, "add_watermarker": False},
}
_DISTILLED: Mapping[str, Any] = {
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "_diffusers_version": "0.15.0",
}
"""What bk-sdm's UNets say beyond Stable Diffusion 1's."""
RECIPES: Mapping[str, Recipe] = {
    "sd1": Recipe(safety_checker=True),
    "sd1-odd": Recipe(
        unet={
            **SD1_UNET,
            "attention_head_dim": 3,
            "block_out_channels": [24, 60, 36],
            "cross_attention_dim": 40,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
            "norm_num_groups": 6,
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
        },
        text={**SD1_TEXT, "hidden_size": 40, "num_attention_heads": 5},
        vae={**VAE, "block_out_channels": [12, 24, 24, 36], "norm_num_groups": 6},
    ),
    "sd1-inpainting": Recipe(
        "StableDiffusionInpaintPipeline", unet={**SD1_UNET, "in_channels": 9}, safety_checker=True
    ),
    "sd1-pix2pix": Recipe(
        "StableDiffusionInstructPix2PixPipeline", unet={**SD1_UNET, "in_channels": 8}, safety_checker=True
    ),
    "sd2-base": Recipe(unet=SD2_UNET, **_V2),  # type: ignore[arg-type]
    "sd2-v": Recipe(
        unet={**SD2_UNET, "sample_size": 12, "upcast_attention": True},
        vae={**VAE, "sample_size": 96},
        scheduler=DDIM_V,
        **_V2,  # type: ignore[arg-type]
    ),
    "sd2-inpainting": Recipe(
        "StableDiffusionInpaintPipeline",
        unet={**SD2_UNET, "in_channels": 9},
        scheduler={**DDIM_V, "prediction_type": "epsilon"},
        **_V2,  # type: ignore[arg-type]
    ),
    "sd2-depth": Recipe(
        "StableDiffusionDepth2ImgPipeline",
        unet={**SD2_UNET, "in_channels": 5},
        depth_estimator=True,
        **_V2,  # type: ignore[arg-type]
    ),
    "x4-upscaler": Recipe(
        "StableDiffusionUpscalePipeline",
        unet=UPSCALER_UNET,
        vae=UPSCALER_VAE,
        scheduler=DDIM_V,
        low_res_scheduler=LOW_RES,
        index={"max_noise_level": 350},
        **_V2,  # type: ignore[arg-type]
    ),
    "sdxl": Recipe(**_XL),
    "sdxl-v-zero-snr": Recipe(**{**_XL, "scheduler": EULER_V_ZERO_SNR}),
    "sdxl-inpainting": Recipe(
        **{**_XL, "pipeline": "StableDiffusionXLInpaintPipeline", "unet": {**SDXL_FLAT_UNET, "in_channels": 9}}
    ),
    "sdxl-pix2pix": Recipe(
        **{
            **_XL,
            "pipeline": "StableDiffusionXLInstructPix2PixPipeline",
            "unet": {**SDXL_FLAT_UNET, "in_channels": 8},
        }
    ),
    "sdxl-refiner": Recipe(
        **{
            **_XL,
            "pipeline": "StableDiffusionXLImg2ImgPipeline",
            "unet": SDXL_REFINER_UNET,
            "text": {},
            "index": {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
        }
    ),
    "sd1-lcm": Recipe("LatentConsistencyModelPipeline", unet={**SD1_UNET, "time_cond_proj_dim": 16}, scheduler=LCM),
    "sdxl-lcm": Recipe(**{**_XL, "unet": {**SDXL_FLAT_UNET, "time_cond_proj_dim": 16}, "scheduler": LCM}),
    "sd1-small": Recipe(unet={**SD1_UNET, **_DISTILLED}),
    "sd1-tiny": Recipe(
        unet={
            **SD1_UNET,
            **_DISTILLED,
            "mid_block_type": None,
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        }
    ),
    "sdxl-small": Recipe(
        **{
            **_XL,
            "unet": {
                **SDXL_UNET,
                "layers_per_block": 2,
                "mid_block_type": "UNetMidBlock2D",
                "reverse_transformer_layers_per_block": [[2, 1, 1], [1, 1, 2], 1],
                "transformer_layers_per_block": [1, [2, 1], [1, 2]],
            },
        }
    ),
}
VARIATIONS = ("sdxl-v-zero-snr", "sd1-lcm", "sdxl-lcm", "sd1-small", "sd1-tiny", "sdxl-small")
"""Kinds of models that are of one of the families."""
FAMILIES = tuple(name for name in RECIPES if name not in VARIATIONS)
BASES = {
    **dict.fromkeys(("sd1-inpainting", "sd1-pix2pix", "sd1-lcm", "sd1-small", "sd1-tiny"), "sd1"),
    **dict.fromkeys(("sd2-inpainting", "sd2-depth"), "sd2-base"),
    **dict.fromkeys(("sdxl-inpainting", "sdxl-pix2pix", "sdxl-refiner", "sdxl-lcm", "sdxl-small"), "sdxl"),
}
"""Whose text encoders and VAE a checkpoint has, as the real one does: those are converted once for all."""


_NOT_OF_ATTENTIONS = ("in_channels", "sample_size", "transformer_layers_per_block")


def attentions(family: str) -> dict[str, str]:
    """By component, what its attentions follow from: two families' are the same where this is. Weights, sizes, what
    a UNet's first layer takes, how many layers have attentions and how many blocks a VAE has do not count."""
    recipe = RECIPES[family]
    vae = (recipe.vae["block_out_channels"][-1], recipe.vae["norm_num_groups"], recipe.vae.get("force_upcast"))
    found: dict[str, Any] = {
        "unet": {key: value for key, value in recipe.unet.items() if key not in _NOT_OF_ATTENTIONS},
        "text_encoder": recipe.text,
        "text_encoder_2": recipe.text_2,
        "vae_decoder": vae,
        "vae_encoder": vae,
        "safety_checker": recipe.safety_checker,
        "depth_estimator": recipe.depth_estimator,
    }
    return {name: repr(network) for name, network in found.items() if network}


def new_attentions() -> dict[str, tuple[str, ...]]:
    """By family, its components with attentions that no earlier family has."""
    seen: set[tuple[str, str]] = set()
    found = {}
    for family in FAMILIES:
        own = attentions(family)
        found[family] = tuple(name for name in own if (name, own[name]) not in seen)
        seen |= set(own.items())
    return {family: names for family, names in found.items() if names}


def build(family: str, folder: Path, seed: int = 0, **unet_overrides: Any) -> Path:
    """Write a tiny random checkpoint of ``family`` (a key of `RECIPES`) into ``folder``; the same seed, the same
    bytes. ``unet_overrides`` replace keys of the UNet's configuration. Returns ``folder``."""
    recipe = RECIPES[family]
    unet = {**recipe.unet, **unet_overrides}
    first = RECIPES[BASES[family]].unet if family in BASES else unet
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        index: dict[str, Any] = {"_class_name": recipe.pipeline, "_diffusers_version": "0.10.0", **recipe.index}
        _write_diffusers(folder / "unet", "UNet2DConditionModel", first)
        _write_diffusers(folder / "vae", "AutoencoderKL", recipe.vae)
        index |= _write_text(folder, recipe)
        _write_json(folder / "scheduler" / "scheduler_config.json", recipe.scheduler)
        index |= {
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", recipe.scheduler["_class_name"]],
        }
        if recipe.low_res_scheduler:
            _write_json(folder / "low_res_scheduler" / "scheduler_config.json", recipe.low_res_scheduler)
            index["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
        index |= _write_extras(folder, recipe)
        if unet is not first:  # which was drawn so that what follows is the base's
            torch.manual_seed(seed)
            _write_diffusers(folder / "unet", "UNet2DConditionModel", unet)
    _write_json(folder / "model_index.json", index)
    return folder


def _write_text(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Tokenizers and text encoders, one or two; their entries of model_index.json. SDXL's second one pads with
    "!"."""
    index: dict[str, Any] = {}
    for suffix, config, padding in (("", recipe.text, recipe.padding), ("_2", recipe.text_2, "!")):
        if not config:
            if recipe.text_2 is not None:
                index |= {f"tokenizer{suffix}": [None, None], f"text_encoder{suffix}": [None, None]}
            continue
        vocabulary = write_tokenizer(folder / f"tokenizer{suffix}", padding)
        class_name = config["architectures"][0]
        _write_text_encoder(folder / f"text_encoder{suffix}", class_name, {**config, "vocab_size": vocabulary})
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        index[f"text_encoder{suffix}"] = ["transformers", class_name]
    return index


def write_tokenizer(folder: Path, padding: str = "<|endoftext|>") -> int:
    """A CLIPTokenizer that knows every byte and `WORDS`, as vocab.json and merges.txt; returns its vocabulary's
    size. As in CLIP, ``!`` is 0 and the end of text has the highest number."""
    letters = [chr(code) for code in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]]
    letters += [chr(0x100 + index) for index in range(256 - len(letters))]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    merges = list(dict.fromkeys(merges))
    tokens += [token for token in dict.fromkeys("".join(pair) for pair in merges) if token not in tokens]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    _write_json(folder / "special_tokens_map.json", {**special, "pad_token": padding})
    config = {**special, "pad_token": padding, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder / "tokenizer_config.json", {**config, "add_prefix_space": False, "do_lower_case": True})
    return len(tokens)


def _write_extras(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The safety checker or the depth estimator with its feature extractor; their entries of model_index.json."""
    from transformers import DPTConfig, DPTForDepthEstimation

    if recipe.depth_estimator:
        model = DPTForDepthEstimation(DPTConfig(**{k: v for k, v in DEPTH.items() if k != "architectures"}))
        _write_json(folder / "depth_estimator" / "config.json", DEPTH)
        tensors = {**model.state_dict(), "head.head.4.bias": torch.full((1,), 2.0)}  # the last ReLU stays open
        tensors["head.head.4.weight"] = 3 * torch.rand(tensors["head.head.4.weight"].shape)
        _write_weights(folder / "depth_estimator" / "model.safetensors", tensors)
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", DPT_IMAGES)
        return {
            "depth_estimator": ["transformers", "DPTForDepthEstimation"],
            "feature_extractor": ["transformers", "DPTImageProcessor"],
        }
    if recipe.safety_checker:
        _write_safety_checker(folder / "safety_checker")
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", CLIP_IMAGES)
        return {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
        }
    if recipe.pipeline in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        return {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {}


def _write_diffusers(folder: Path, class_name: str, config: Mapping[str, Any]) -> None:
    import diffusers

    model = getattr(diffusers, class_name).from_config(dict(config))
    write_network(folder, config, model.state_dict())


def write_network(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """A network of diffusers as its ``save_pretrained`` writes it, in float16, with its vectors moved."""
    _write_json(folder / "config.json", config)
    _write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)


def _write_text_encoder(folder: Path, class_name: str, config: Mapping[str, Any]) -> None:
    import transformers
    from transformers import CLIPTextConfig

    model = getattr(transformers, class_name)(
        CLIPTextConfig(**{k: v for k, v in config.items() if k != "architectures"})
    )
    _write_json(folder / "config.json", config)
    _write_weights(folder / "model.safetensors", _published_text(model.state_dict()))


def _write_safety_checker(folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    model = StableDiffusionSafetyChecker(CLIPConfig(**{k: v for k, v in SAFETY.items() if k != "architectures"}))
    tensors = {}
    for name, value in model.state_dict().items():
        inner = name.startswith("vision_model.") and not name.startswith("vision_model.vision_model.")
        tensors[f"vision_model.{name}" if inner else name] = value
    for name in ("concept_embeds", "special_care_embeds"):
        tensors[name] = torch.randn(tensors[name].shape)
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        tensors[name] = 0.6 + 0.1 * torch.rand(tensors[name].shape)  # flags few pictures
    _write_json(folder / "config.json", SAFETY)
    _write_weights(folder / "model.safetensors", tensors)


def _published_text(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    projection = {name: value for name, value in tensors.items() if name.startswith("text_projection.")}
    rest = {name: value for name, value in tensors.items() if name not in projection}
    return {**_published(rest, "text_model."), **projection}


def _published(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Names as the published checkpoints have them: transformers 5 dropped ``prefix`` from its module names."""
    return {name if name.startswith(prefix) else prefix + name: value for name, value in tensors.items()}


def _write_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """float16, with vectors (biases, norms) moved off 0 and 1, so that mixing them up shows."""
    stored = {}
    for name, value in tensors.items():
        moves = value.is_floating_point() and value.ndim == 1 and "concept" not in name and "care" not in name
        moved = value + 0.1 * torch.randn(value.shape) if moves else value
        stored[name] = moved.detach().to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path, metadata={"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
