"""Where the networks of a single file lie, under all the names that writers give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diffusion_convert.checkpoint import diffusers_unet
from diffusion_convert.checkpoint.ldm_shapes import Tensors
from diffusion_convert.checkpoint.tensor_file import below
from diffusion_runtime.families import COMPONENTS, T5


@dataclass(frozen=True, slots=True)
class Network:
    """Under which prefixes a network may lie, the first that is there, and what it becomes. ``kind`` is a key of
    `ldm_shapes.SIZES` and `ldm_names.NAMES`."""

    kind: str
    prefixes: tuple[str, ...]
    subfolder: str
    class_name: str


_CLIP_H = ("clip_h.", "cond_stage_model.clip_h.", "text_encoders.clip_h.")
NETWORKS = (
    Network("unet", ("model.diffusion_model.", "diffusion_model."), "unet", "UNet2DConditionModel"),
    Network("vae", ("first_stage_model.", "vae."), "vae", "AutoencoderKL"),
    Network(
        "clip",
        (
            "cond_stage_model.transformer.",
            "conditioner.embedders.0.transformer.",
            # as node editors keep it: by the name of the encoder (CLIP ViT-L, or OpenCLIP ViT-H of SD 2)
            *(
                f"{outer}{encoder}.transformer."
                for outer in ("", "conditioner.", "cond_stage_model.", "text_encoders.")
                for encoder in ("clip_l", "clip_h")
            ),
        ),
        "text_encoder",
        "CLIPTextModel",
    ),
    Network(
        "open_clip",
        tuple(f"{outer}model." for outer in ("cond_stage_model.", *_CLIP_H)),
        "text_encoder",
        "CLIPTextModel",
    ),
    Network(
        "clip_2",
        (
            "conditioner.embedders.1.transformer.",
            *(
                f"{outer}clip_g.transformer."
                for outer in ("", "conditioner.", "cond_stage_model.", "text_encoders.")
            ),
        ),
        "text_encoder_2",
        "CLIPTextModelWithProjection",
    ),
    Network(
        "open_clip_2",
        # the refiner has no other encoder
        ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "clip_g.model."),
        "text_encoder_2",
        "CLIPTextModelWithProjection",
    ),
    Network("depth", ("depth_model.model.",), "depth_estimator", "DPTForDepthEstimation"),
)
SD3_NETWORKS = (
    Network("mmdit", ("model.diffusion_model.", ""), "transformer", "SD3Transformer2DModel"),
    Network("vae", ("first_stage_model.", "vae."), "vae", "AutoencoderKL"),
    Network("clip_l", ("text_encoders.clip_l.transformer.",), "text_encoder", "CLIPTextModelWithProjection"),
    Network("clip_2", ("text_encoders.clip_g.transformer.",), "text_encoder_2", "CLIPTextModelWithProjection"),
    Network("t5", ("text_encoders.t5xxl.transformer.",), COMPONENTS[T5].subfolder, "T5EncoderModel"),
)
"""Those of Stable Diffusion 3 in one file, as Stability AI publishes it."""
_MMDIT_MARK = "joint_blocks.0.x_block.attn.qkv.weight"
_BARE_UNET = "input_blocks.0.0.weight"
_UNET_MARK = f"{NETWORKS[0].prefixes[0]}{_BARE_UNET}"
_ADDED = "label_emb.0.0.weight"
_BARE_TEXT = ("", "cond_stage_model.", "text_encoder.", "te.")
_TEXT_MARK = "text_model.embeddings.token_embedding.weight"
_VAE_MARK, _VAE_PARTS = "decoder.conv_in.weight", ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
AVERAGED = "model_ema."
"""Under this lie the averages that training keeps of the UNet, by names without dots."""

OTHER_LAYOUTS: Mapping[str, str] = {
    "lora_unet_": "a LoRA: give it with --lora, next to the checkpoint that it is for",
    "lora_te": "a LoRA: give it with --lora, next to the checkpoint that it is for",
    "unet.": "a LoRA in diffusers' layout: give it with --lora, next to the checkpoint that it is for",
    "control_model.": "a ControlNet and not a checkpoint",
    "double_blocks.": "a Flux model, which is not covered",
    "model.diffusion_model.double_blocks.": "a Flux model, which is not covered",
    "encoder.down.": "a VAE alone: give it with --vae",
    "text_model.": "a text encoder alone: a checkpoint has a UNet, too",
    "transformer.resblocks.": "a text encoder alone: a checkpoint has a UNet, too",
}
"""What files of other kinds are, by how one of their names begins."""

_WORDS = re.compile(
    "|".join(
        sorted(
            (
                *("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "cond_proj", "out"),
                *("in_layers", "out_layers", "emb_layers", "skip_connection", "op", "conv"),
                *("norm", "norm1", "norm2", "norm3", "proj_in", "proj_out", "transformer_blocks"),
                *("attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "weight", "bias"),
            ),
            key=len,
            reverse=True,
        )
    )
    + r"|\d+"
)


def unwrapped(tensors: Tensors) -> Tensors:
    """The tensors without what wrappers of a whole model (``module.``, ``_orig_mod.``, ``state_dict.``) put before
    all names of LDM's."""
    prefix = next((name.removesuffix(_UNET_MARK) for name in tensors if name.endswith(f".{_UNET_MARK}")), "")
    if not prefix or _UNET_MARK in tensors:
        return tensors
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def split(tensors: Tensors) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each network of a file, by kind and by the names inside the network. Training's averages
    (``model_ema.…``) are taken where the file has no other UNet; noise schedules belong to no network."""
    if any(f"{prefix}{_MMDIT_MARK}" in tensors for prefix in SD3_NETWORKS[0].prefixes):
        found = {network.kind: _of_sd3(tensors, network) for network in SD3_NETWORKS}
        return {kind: part for kind, part in found.items() if part}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for network in NETWORKS:
        prefix = next((prefix for prefix in network.prefixes if any(n.startswith(prefix) for n in tensors)), None)
        if prefix is None and network.kind == "unet" and _BARE_UNET in tensors:
            prefix = ""
        if prefix is not None:
            parts[network.kind] = below(tensors, prefix)
    _add_bare(tensors, parts)
    if "open_clip_2" in parts and _ADDED not in parts.get("unet", {_ADDED: None}):
        parts.setdefault("open_clip", parts.pop("open_clip_2"))  # Stable Diffusion 2 as Stability AI's sgm keeps it
    for kind in ("clip", "clip_2"):
        if kind in parts and not any(n.startswith("text_model.") for n in parts[kind]):
            parts[kind] = {_within_text_model(n): value for n, value in parts[kind].items()}
    if "vae" in parts:
        parts["vae"] = {_ldm_vae_name(n): value for n, value in parts["vae"].items()}
    if diffusers_unet.is_one(tensors):
        parts["unet"] = diffusers_unet.by_ldm_names(tensors)
    if "unet" not in parts and (averaged := _averaged(tensors)):
        parts["unet"] = averaged
    return parts


def _of_sd3(tensors: Tensors, network: Network) -> dict[str, torch.Tensor]:
    """What of a file is of the network, by the names inside it; nothing where it is not there."""
    of_others = tuple(prefix for other in SD3_NETWORKS for prefix in other.prefixes if prefix)
    for prefix in network.prefixes:
        found = below(tensors, prefix)
        if not prefix:
            found = {name: value for name, value in found.items() if not name.startswith(of_others)}
        if found:
            return found
    return {}


def _add_bare(tensors: Tensors, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    """Text encoders and autoencoders that merging tools write without a prefix, or with another."""
    if not parts.keys() & {"clip", "open_clip", "clip_2", "open_clip_2"}:
        prefix = next((prefix for prefix in _BARE_TEXT if f"{prefix}{_TEXT_MARK}" in tensors), None)
        if prefix is not None:
            parts["clip"] = {n: v for n, v in below(tensors, prefix).items() if n.startswith("text_model.")}
    if "vae" not in parts and _VAE_MARK in tensors:
        parts["vae"] = {n: value for n, value in tensors.items() if n.startswith(_VAE_PARTS)}


def only_averaged(tensors: Tensors) -> bool:
    """Whether the UNet of `split` is the one that training averaged."""
    others = (*NETWORKS[0].prefixes, _BARE_UNET)
    return (
        not any(name.startswith(others) for name in tensors)
        and not diffusers_unet.is_one(tensors)
        and bool(_averaged(tensors))
    )


def _averaged(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {_dotted(name): value for name, value in below(tensors, f"{AVERAGED}diffusion_model").items()}


def _dotted(flat: str) -> str:
    """``input_blocks110transformer_blocks0normweight`` -> ``input_blocks.11.0.transformer_blocks.0.norm.weight``:
    the last digit is that of a block's part, of which there are three at most."""
    words = _WORDS.findall(flat)
    if "".join(words) != flat:
        return flat
    if words[0] in ("input_blocks", "output_blocks") and len(words[1]) > 1:
        words[1] = f"{words[1][:-1]}.{words[1][-1]}"
    if words[0] == "label_emb" and words[1].isdigit():
        words[1] = ".".join(words[1])
    return ".".join(words)


def _within_text_model(name: str) -> str:
    """Newer writers leave the level of the model inside of the model out; the projection never was in it."""
    return name if name.startswith("text_projection") else f"text_model.{name}"


def _ldm_vae_name(name: str) -> str:
    """Some trainers write an autoencoder's attention by diffusers' names inside of LDM's."""
    head, attention, tail = name.partition(".attn_1.")
    for theirs, ours in (("to_out.0.", "proj_out."), ("to_", ""), ("group_norm.", "norm.")):
        if attention and tail.startswith(theirs):
            return f"{head}{attention}{ours}{tail.removeprefix(theirs)}"
    older = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
    part, dot, kind = tail.partition(".")
    return f"{head}{attention}{older.get(part, part)}{dot}{kind}" if attention else name
