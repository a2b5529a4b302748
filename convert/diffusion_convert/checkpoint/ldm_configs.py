"""Configurations for checkpoints in CompVis (LDM) layout, put together from four sources. Later ones win:

``configs/FAMILY.json``; the shapes in the file (`ldm_shapes`) with head counts by the family's rule; ``STEM.yaml``
next to the file (the LDM configuration, as web interfaces keep it there); ``STEM.config.json`` next to the file
(diffusers' keys by subfolder, ``{"unet": {"attention_head_dim": 8}, …}``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_convert.checkpoint import ldm_shapes
from diffusion_convert.checkpoint.ldm_shapes import FULL_OPEN_CLIP_BLOCKS
from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError
from diffusion_runtime.real_path import is_there

FOLDER = Path(__file__).parent / "configs"

TEXT_LAYER = "text layer"
"""The section of `read_beside` that says which of the text encoder's states are used, in an LDM configuration's
words: ``{"layer": "hidden", "layer_idx": -2}``."""

UNET_RULES = ("unet_head_channels", "only_cross_attention")
"""The rules of a family that are about its UNet."""
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
"""What reading a configuration raises that is built otherwise than expected."""
Sections = Mapping[str, Mapping[str, Any]]


def family_data(family: str) -> dict[str, Any]:
    """What ``configs/FAMILY.json`` says, over what the family that it extends says, section by section."""
    data = strict_json.read_object(FOLDER / f"{family}.json", CheckpointError)
    parent = data.pop("extends", None)
    return data if parent is None else merge(family_data(parent), data)


def config(
    kind: str, subfolder: str, part: ldm_shapes.Tensors, data: Mapping[str, Any], beside: Sections
) -> dict[str, Any]:
    """The configuration of one network of a file. Raises CheckpointError where something cannot be known."""
    given = beside.get(subfolder, {})
    sized = merge(data.get(subfolder, {}), ldm_shapes.SIZES[kind](part))
    if subfolder == "text_encoder":
        sized["num_hidden_layers"] = text_layers(kind, sized["num_hidden_layers"], data, beside.get(TEXT_LAYER, {}))
    ruled = {key: rule() for key, rule in _rules(kind, sized, data.get("rules", {})).items() if key not in given}
    return merge({**sized, **ruled}, given)


def read_beside(path: Path) -> dict[str, Any]:
    """Sections of the configuration files next to a checkpoint; empty if there are none. Raises CheckpointError."""
    return merge(_read_yaml(path.with_suffix(".yaml")), _read_json(path.with_suffix(".config.json")))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, and so on inside the mappings that both have."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _rules(kind: str, sized: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    """What no shape shows, as calls by configuration key. (What diffusers' UNet calls ``attention_head_dim`` is the
    number of heads.)"""
    decided: dict[str, Any] = {}
    if kind == "unet":
        blocks = sized["block_out_channels"]
        if rules.get("only_cross_attention") == "all but the last":
            decided["only_cross_attention"] = lambda: [True] * (len(blocks) - 1) + [False]
        if rules.get("unet_head_channels"):
            decided["attention_head_dim"] = lambda: [_heads(width, rules["unet_head_channels"]) for width in blocks]
    elif kind not in ("vae", "mmdit", "t5"):
        decided["num_attention_heads"] = lambda: _heads(sized["hidden_size"], rules["head_channels"])
    return decided


def text_layers(kind: str, there: int, data: Mapping[str, Any], asked: Mapping[str, Any]) -> int:
    """How many of the layers that a text encoder has in a file are used: without ``asked`` (the section
    `TEXT_LAYER`), all, but not the last where the family takes the states before that. Raises CheckpointError for a
    layer that is not there."""
    whole = there
    penultimate = bool(data.get("rules", {}).get("penultimate_states"))  # taken of all layers when it runs
    if data.get("rules", {}).get("before_last_text_layer"):
        # What diffusers saved lacks the last layer. OpenCLIP's names are used by files that have it, and by some
        # full-size ones without it.
        lacks_last = there != FULL_OPEN_CLIP_BLOCKS if kind == "clip" else there == FULL_OPEN_CLIP_BLOCKS - 1
        whole = there + 1 if lacks_last else there
        usual = whole - 1
    else:
        usual = whole
    index = asked.get("layer_idx")
    if asked.get("layer") == "hidden" and isinstance(index, int):  # 0: the embeddings, -1: all layers
        used = index if index >= 0 else whole + 1 + index
    else:
        used = {None: usual - penultimate, "last": whole, "penultimate": whole - 1}.get(asked.get("layer"), 0)
    used += penultimate
    if not 1 <= used <= there:
        told = ", ".join(f"{key}: {value}" for key, value in asked.items())
        raise CheckpointError(f"{told}: no such layer in the file's text encoder, which has {there}")
    return used


def skips(kind: str, part: ldm_shapes.Tensors, data: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether ``asked`` takes other states of the text encoder than the family does."""
    there = ldm_shapes.SIZES[kind](part)["num_hidden_layers"]
    return text_layers(kind, there, data, asked) != text_layers(kind, there, data, {})


def _heads(channels: int, head_channels: int) -> int:
    if channels % head_channels:
        raise CheckpointError(
            f"{channels} channels are no multiple of {head_channels}, the width of a head in this family: give the "
            "number of heads in a file STEM.config.json next to it"
        )
    return channels // head_channels


def _read_json(path: Path) -> dict[str, Any]:
    if not is_there(path, CheckpointError):
        return {}
    read = strict_json.read_object(path, CheckpointError)
    if not all(isinstance(section, dict) for section in read.values()):
        raise CheckpointError(f'{path}: expected diffusers\' keys by subfolder, {{"unet": {{…}}, …}}')
    return read


def read_parameters(path: Path) -> dict[str, Any] | None:
    """The model's parameters in an LDM configuration, None where there is no such file. Raises CheckpointError."""
    if not is_there(path, CheckpointError):
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"])
    except (OSError, *MALFORMED, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not an LDM configuration: {error!r}".splitlines()[0]) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    """The parts of an LDM configuration that shapes do not show, as diffusers' keys."""
    model = read_parameters(path)
    if model is None:
        return {}
    try:
        unet = (model.get("unet_config") or model["network_config"])["params"]
        width, heads = int(unet.get("num_head_channels", -1)), int(unet.get("num_heads", -1))
        blocks = [int(unet["model_channels"]) * int(multiple) for multiple in unet["channel_mult"]]
        text = _text_section(model)
        numbers = {key: float(model[key]) for key in ("scale_factor", "linear_start", "linear_end") if key in model}
        denoiser = (model.get("denoiser_config") or {}).get("params") or {}
        scaling = str(denoiser["scaling_config"]["target"]) if "scaling_config" in denoiser else None
    except MALFORMED as error:
        raise CheckpointError(f"{path}: not an LDM configuration: {error!r}".splitlines()[0]) from error
    prediction = {"v": "v_prediction", "eps": "epsilon"}.get(str(model.get("parameterization", "eps")))
    if scaling is not None:
        prediction = {"VScaling": "v_prediction", "EpsScaling": "epsilon"}.get(scaling.rpartition(".")[2])
    found: dict[str, dict[str, Any]] = {
        "unet": {"attention_head_dim": heads if heads > 0 else [_heads(channels, width) for channels in blocks]},
        "vae": {"scaling_factor": numbers.get("scale_factor")},
        "scheduler": {
            "prediction_type": prediction,
            "beta_start": numbers.get("linear_start"),
            "beta_end": numbers.get("linear_end"),
        },
        TEXT_LAYER: {"layer": text.get("layer"), "layer_idx": text.get("layer_idx")},
    }
    told = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in found.items()}
    return {section: keys for section, keys in told.items() if keys}


def _text_section(model: Mapping[str, Any]) -> dict[str, Any]:
    """What an LDM configuration says of its (first) text encoder's states. Configurations of SDXL list embedders,
    the last of which embed sizes; of the second encoder, the states before the last are all that there is."""
    embedders = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    text = embedders[0] if embedders else model.get("cond_stage_config") or {}
    return dict(text.get("params") or {})
