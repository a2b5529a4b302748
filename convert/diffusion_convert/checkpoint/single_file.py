"""A checkpoint in one .safetensors or .ckpt file, in CompVis (LDM) layout, opened offline.

What the networks are is in the shapes and in our own data (`ldm_configs`); what the weights are called follows
diffusers' mapping (`ldm_names`). The file carries no tokenizer: ``vocab.json`` and ``merges.txt`` beside it or in a
folder ``tokenizer`` beside it are taken, else CLIP's, which every published Stable Diffusion checkpoint uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint import ldm_configs, ldm_names, ldm_shapes, tensor_file
from diffusion_convert.checkpoint import torch_networks as networks
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_runtime.bundle.integrity import sha256
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES, Family

if TYPE_CHECKING:
    import torch

CLIP_VOCABULARY_SIZE = 49408
TELLING_BIAS, MIN_V_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
"""How ModelSpec's ``modelspec.prediction_type`` is spelt -> diffusers' name."""
BASE_GLOBAL_STEP = 875_000
"""``global_step`` of the official 512-base-ema.ckpt, by which diffusers, too, knows the epsilon model of SD 2."""


@dataclass(frozen=True, slots=True)
class Network:
    """Where in the file a network lies, and what it becomes. ``kind`` is a key of SIZES and NAMES."""

    kind: str
    prefix: str
    subfolder: str
    class_name: str


NETWORKS = (
    Network("unet", "model.diffusion_model.", "unet", "UNet2DConditionModel"),
    Network("vae", "first_stage_model.", "vae", "AutoencoderKL"),
    Network("clip", "cond_stage_model.transformer.", "text_encoder", "CLIPTextModel"),
    Network("open_clip", "cond_stage_model.model.", "text_encoder", "CLIPTextModel"),
    Network("depth", "depth_model.model.", "depth_estimator", "DPTForDepthEstimation"),
)
OTHER_LAYOUTS: Mapping[str, str] = {
    "conditioner.embedders.": "a Stable Diffusion XL file: give its diffusers folder or Hub id instead",
    "lora_unet_": "a LoRA: give it with --lora, next to the checkpoint that it is for",
    "lora_te": "a LoRA: give it with --lora, next to the checkpoint that it is for",
    "unet.": "a LoRA in diffusers' layout: give it with --lora, next to the checkpoint that it is for",
    "control_model.": "a ControlNet and not a checkpoint",
    "down_blocks.": "a UNet in diffusers' layout: give the folder that holds model_index.json",
    "double_blocks.": "a Flux model, which is not covered",
    "model.diffusion_model.double_blocks.": "a Flux model, which is not covered",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model, which is not covered",
    "encoder.down.": "a VAE alone: give it with --vae",
}


def open_single_file(path: Path, family: str | None = None, without_vae: bool = False) -> Checkpoint:
    """The checkpoint in a file. Weights stay in the file: each call of a submodel's ``tensors`` maps it anew.

    ``family`` decides what the file does not. ``without_vae``: the file needs none, as another is put in. Raises
    CheckpointError for a file that is damaged, incomplete or of another kind, InputError for a family that
    contradicts the file.
    """
    file = tensor_file.read(path)
    parts = split(file.tensors)
    layout = _layout(path, file.tensors, parts, without_vae)
    beside = ldm_configs.merge(_declared(file), ldm_configs.read_beside(path))
    found, notes = _family(path, layout, family, parts["unet"], file.scalars, beside)
    data = ldm_configs.family_data(found)
    models = {
        network.subfolder: submodel(path, network, parts[network.kind], data, beside)
        for network in NETWORKS
        if network.kind in parts
    }
    return Checkpoint(
        name=path.stem,
        family=found,
        source=Source(name=path.name, sha256=sha256(path)),
        models=models,
        schedulers={
            name: ldm_configs.merge(data[name], beside.get(name, {}))
            for name in ("scheduler", "low_res_scheduler")
            if name in data
        },
        tokenizer=_tokenizer(path, data["tokenizer"], models["text_encoder"].config["vocab_size"]),
        pipeline_class=data["pipeline_class"],
        pipeline_config=data.get("pipeline_config", {}),
        notes=notes,
    )


def split(tensors: ldm_shapes.Tensors) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each network of a file, by kind and by the names inside the network. Training's own copies
    (``model_ema.…``) and noise schedules belong to none."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for network in NETWORKS:
        part = {
            n.removeprefix(network.prefix): value for n, value in tensors.items() if n.startswith(network.prefix)
        }
        if network.kind == "clip" and not any(n.startswith("text_model.") for n in part):
            part = {f"text_model.{n}": value for n, value in part.items()}  # newer writers leave that out
        if part:
            parts[network.kind] = part
    return parts


def submodel(
    path: Path,
    network: Network,
    part: ldm_shapes.Tensors,
    data: Mapping[str, Any],
    beside: ldm_configs.Sections,
) -> Submodel:
    """One network of a file, checked to be whole. ``part`` is what `split` found of it."""
    try:
        config = ldm_configs.config(network.kind, network.subfolder, part, data, beside)
        mapped = _mapped(network.kind, part, config)
        if network.kind == "unet":
            _check_all_used(part, mapped)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    found = Submodel(network.class_name, config, partial(_map_tensors, path, network.kind, config))
    networks.check(found, mapped, f"{path}: {network.subfolder}")
    return found


def _mapped(kind: str, part: ldm_shapes.Tensors, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    try:
        return ldm_names.NAMES[kind](part, config)
    except (LookupError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"weights of unexpected shapes: {error}".splitlines()[0]) from error


def _map_tensors(path: Path, kind: str, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    return ldm_names.NAMES[kind](split(tensor_file.read(path).tensors)[kind], config)


def _check_all_used(part: ldm_shapes.Tensors, mapped: ldm_shapes.Tensors) -> None:
    """A UNet with something more than the family's has another meaning: nothing of it is left out in silence."""
    used = {id(value) for value in mapped.values()}
    if left := [name for name, value in part.items() if id(value) not in used]:
        raise CheckpointError(f"its UNet has parts that no covered family has: {networks.listed(left)}")


def _layout(
    path: Path, tensors: ldm_shapes.Tensors, parts: Mapping[str, ldm_shapes.Tensors], without_vae: bool
) -> tuple[str, int]:
    """The kind of the text encoder, and the UNet's input channels."""
    text = next((kind for kind in ("clip", "open_clip") if kind in parts), None)
    needed = ("unet",) if without_vae else ("unet", "vae")
    if text is None or any(kind not in parts for kind in needed):
        for prefix, what in OTHER_LAYOUTS.items():
            if any(name.startswith(prefix) for name in tensors):
                raise CheckpointError(f"{path}: this is {what}")
        missing = [kind for kind in needed if kind not in parts] + ["text encoder"] * (text is None)
        what = "give one with --vae" if missing == ["vae"] else "expected a checkpoint in CompVis layout"
        raise CheckpointError(f"{path}: has no {' and no '.join(missing)}: {what}")
    first = "input_blocks.0.0.weight"
    channels = parts["unet"][first].shape[1] if first in parts["unet"] and parts["unet"][first].ndim == 4 else 0
    if not _alike(text, channels):
        pairs = dict.fromkeys((family.text_encoder, family.in_channels) for family in FAMILIES.values())
        known = ", ".join(f"{kind} with {count}" for kind, count in pairs)
        raise CheckpointError(f"{path}: {text} text encoder with {channels} input channels; known are {known}")
    if (text, channels) == ("open_clip", 5) and "depth" not in parts:
        raise CheckpointError(f"{path}: its UNet takes depth, but the depth estimator (depth_model.) is missing")
    return text, channels


def _alike(text_encoder: str, channels: int) -> list[Family]:
    """The families whose files look so."""
    wanted = (text_encoder, channels)
    return [family for family in FAMILIES.values() if (family.text_encoder, family.in_channels) == wanted]


def _declared(file: tensor_file.TensorFile) -> dict[str, dict[str, Any]]:
    """What a file says of itself: by a tensor named ``v_pred``, as trainers mark models of that kind, or in the
    metadata of the ModelSpec standard."""
    spec = str(file.scalars.get("modelspec.prediction_type", "")).lower()
    found = PREDICTIONS.get(spec) if "v_pred" not in file.tensors else "v_prediction"
    return {"scheduler": {"prediction_type": found}} if found else {}


def _family(
    path: Path,
    layout: tuple[str, int],
    asked: str | None,
    unet: ldm_shapes.Tensors,
    scalars: Mapping[str, int | float | str],
    beside: ldm_configs.Sections,
) -> tuple[str, tuple[str, ...]]:
    """The family and, where it was not certain, a sentence that says so."""
    alike = _alike(*layout)
    names = [family.name for family in alike]
    if asked is not None and asked not in names:
        raise InputError(
            f"{path}: family {asked!r} does not fit a file with a {layout[0]} text encoder and {layout[1]} input "
            f"channels: expected {' or '.join(names)}"
        )
    if asked is not None or len(names) == 1:
        return asked or names[0], ()
    by_prediction = {kind: family.name for family in reversed(alike) for kind in family.prediction_types}
    prediction = beside.get("scheduler", {}).get("prediction_type")
    if prediction is not None:
        return by_prediction.get(prediction, by_prediction["epsilon"]), ()
    if scalars.get("global_step") == BASE_GLOBAL_STEP:
        return by_prediction["epsilon"], ()
    v, noise = by_prediction["v_prediction"], by_prediction["epsilon"]
    likely, other = (v, noise) if predicts_v(unet) else (noise, v)
    note = (
        f"{path.name} does not say whether it predicts v (768 pixels) or the noise (512 pixels): judged by its "
        f"weights to be {likely}; --family {other} chooses the other"
    )
    return likely, (note,)


def predicts_v(unet: ldm_shapes.Tensors) -> bool:
    """Whether SD 2 weights are of a model that predicts v: those have learnt a wide bias before the last attention,
    as ComfyUI judges them, too. Where the UNet is another than SD 2's, v is assumed."""
    bias = unet.get(TELLING_BIAS)
    return bias is None or float(bias.float().std(correction=0)) > MIN_V_SPREAD


def _tokenizer(path: Path, settings: str, vocabulary_size: int) -> dict[str, Path]:
    """Files by name: those beside the checkpoint, else CLIP's vocabulary with the family's settings."""
    for folder in (path.parent / "tokenizer", path.parent):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
            return _files(ldm_configs.FOLDER / "clip" / settings) | {
                name: folder / name for name in names if (folder / name).is_file()
            }
    if vocabulary_size < CLIP_VOCABULARY_SIZE:
        raise CheckpointError(
            f"{path}: its text encoder knows {vocabulary_size} tokens, CLIP's tokenizer {CLIP_VOCABULARY_SIZE}: "
            "put its vocab.json and merges.txt beside it, or into a folder `tokenizer` there"
        )
    clip = ldm_configs.FOLDER / "clip"
    return {"vocab.json": clip / "vocab.json", "merges.txt": clip / "merges.txt"} | _files(clip / settings)


def _files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir())}
