"""LoRA files: which layers they change, whatever the trainer called them.

Two layouts are known, and every generation of them: kohya's (``lora_unet_….lora_down.weight``, with convolutions
and Tucker cores as LyCORIS' LoCon has them) and diffusers' (``unet.….lora_A.weight`` and its forerunners; peft's
own folders). DoRA, LoHa and other relatives compute something else and are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint import tensor_file
from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in a .safetensors file: ``{"unet.lora_alpha": 8, …}`` as JSON."""

PREFIXES: Mapping[str, str] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
}
OTHER_KINDS: Mapping[str, str] = {
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.ia3_": "IA3",
    r"\.diff(_b)?$": "whole differences of weights",
    r"\.lora_B\.bias$": "biases",
}
"""By a mark in their tensors' names."""

_WEIGHT = re.compile(
    r"(?P<module>.+?)(?:\.lora_|\.lora\.|\.lora_linear_layer\.|(?P<old>_lora)\.)(?P<part>down|up|mid|A|B)"
    r"(?:\.default)?\.weight"
)
_PARTS = {"A": "down", "B": "up"}
_OLD_NAMES: Sequence[tuple[str, str]] = (
    (r"\.self_attn\.to_(q|k|v)$", r".self_attn.\1_proj"),
    (r"\.self_attn\.to_out$", ".self_attn.out_proj"),
    (r"\.processor\.to_out$", ".to_out.0"),
    (r"\.processor\.", "."),
)
"""What diffusers before 0.20 called the layers of its attention processors."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What a file has for one layer: ``down`` (rank, in, …kernel), ``up`` (out, rank, …ones), ``mid`` (rank, rank,
    …kernel) or None, and ``scale``, which is alpha / rank. ``module`` is its name in the network."""

    subfolder: str
    module: str
    names: Sequence[str]
    down: torch.Tensor
    up: torch.Tensor
    mid: torch.Tensor | None
    scale: float


@dataclass(frozen=True, slots=True)
class LoraFile:
    """``unknown`` are the names in the file that are of no known form."""

    path: Path
    layers: Sequence[Layer]
    unknown: Sequence[str]
    size: int


@dataclass(frozen=True, slots=True)
class _Settings:
    """peft's settings for one network: alpha, other alphas by the ends of module names, and how rank divides."""

    alpha: float
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def scale(self, module: str, rank: int) -> float:
        alpha = next((a for end, a in self.patterns.items() if f".{module}".endswith(f".{end}")), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read(path: Path) -> LoraFile:
    """The layers of a LoRA file, or of the LoRA in a folder. Raises InputError for what is no plain LoRA,
    CheckpointError for a damaged file."""
    path = _in_folder(path) if path.is_dir() else path
    tensors = tensor_file.read(path).tensors
    for name in tensors:
        if (kind := next((kind for mark, kind in OTHER_KINDS.items() if re.search(mark, name)), None)) is not None:
            raise InputError(f"{path}: {name} is of {kind}, which is not covered: expected a plain LoRA")
    if not tensors:
        raise InputError(f"{path}: holds no tensors: expected a LoRA")
    settings = _settings(path)
    found: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for name in tensors:
        if (parsed := parse(name)) is None:
            unknown.append(name)
        else:
            subfolder, module, part = parsed
            found.setdefault((subfolder, module), {})[part] = name
    layers = [
        _layer(path, place, {part: (name, tensors[name]) for part, name in names.items()}, settings.get(place[0]))
        for place, names in found.items()
    ]
    return LoraFile(path, layers, unknown, len(tensors))


def parse(name: str) -> tuple[str, str, str] | None:
    """Subfolder, module and part ("down", "up", "mid", "alpha") that a tensor's name stands for. Modules of text
    encoders come without ``text_model.``, which not every trainer writes."""
    if name.endswith(".alpha"):
        place, part, old = name.removesuffix(".alpha"), "alpha", False
    elif (found := _WEIGHT.fullmatch(name)) is not None:
        place, part, old = found["module"], _PARTS.get(found["part"], found["part"]), found["old"] is not None
    else:
        return None
    # diffusers before 0.15 saved the UNet's attention processors alone, without a prefix
    prefix = next((prefix for prefix in PREFIXES if place.startswith(prefix)), "")
    module = place.removeprefix(prefix)
    if old or ".processor." in module:
        for pattern, new in _OLD_NAMES:
            module = re.sub(pattern, new, module)
    return PREFIXES.get(prefix, "unet"), re.sub(r"^text_model[._]", "", module), part


def _layer(
    path: Path,
    place: tuple[str, str],
    parts: Mapping[str, tuple[str, torch.Tensor]],
    settings: _Settings | None,
) -> Layer:
    names = [name for name, _ in parts.values()]
    if not {"down", "up"} <= parts.keys():
        raise InputError(f"{path}: {names[0]} stands alone: expected both halves of a LoRA's layer")
    down, up = parts["down"][1], parts["up"][1]
    rank = down.shape[0] if down.ndim else 0
    for half in (down, up):
        if half.ndim not in (2, 4) or not half.is_floating_point() or not half.numel():
            raise InputError(
                f"{path}: {names[0]} has shape {tuple(half.shape)}: expected a matrix or a convolution"
            )
    if "alpha" in parts:
        if parts["alpha"][1].numel() != 1:
            raise InputError(f"{path}: {parts['alpha'][0]} is no single number")
        scale = float(parts["alpha"][1]) / rank
    else:
        scale = settings.scale(place[1], rank) if settings is not None else 1.0
    return Layer(*place, names, down, up, parts["mid"][1] if "mid" in parts else None, scale)


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in FILE_NAMES if (folder / name).is_file()][:1] or sorted(
        folder.glob("*.safetensors")
    )
    if len(found) != 1:
        raise InputError(f"{folder}: expected one LoRA file in this folder, found {len(found)}")
    return found[0]


def _settings(path: Path) -> dict[str, _Settings]:
    """peft's settings by subfolder, from adapter_config.json beside the file or from the file's own metadata."""
    beside = path.parent / "adapter_config.json"
    try:
        if path.name == "adapter_model.safetensors" and beside.is_file():
            return {"unet": _parse_settings(strict_json.read_object(beside, CheckpointError))}
        flat = strict_json.parse_object(
            _metadata(path).get(METADATA_KEY, "{}"), f"{path}: its metadata", CheckpointError
        )
        networks = {key.split(".")[0] for key in flat}
        return {
            network: _parse_settings({k.removeprefix(f"{network}."): v for k, v in flat.items()})
            for network in networks
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its adapter settings cannot be read: {error}") from error


def _parse_settings(values: Mapping[str, Any]) -> _Settings:
    if values.get("use_dora"):
        raise InputError("a DoRA, which is not covered: expected a plain LoRA")
    patterns = {key.removeprefix("text_model."): float(a) for key, a in (values.get("alpha_pattern") or {}).items()}
    alpha = values.get("lora_alpha")
    if alpha is None:
        raise ValueError("lora_alpha is missing")
    return _Settings(float(alpha), patterns, bool(values.get("use_rslora")))


def _metadata(path: Path) -> Mapping[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}  # a pickled file: read before, and without metadata
