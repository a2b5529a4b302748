"""peft's settings of an adapter: adapter_config.json next to it, or what diffusers keeps in the file's header."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.real_path import is_there

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in a .safetensors file: ``{"unet.lora_alpha": 8, …}`` as JSON."""
CONFIG_NAME = "adapter_config.json"
TYPES = ("LORA", "LOHA", "LOKR", "IA3")
_CHANGING = ("pissa", "corda", "olora", "loftq")
"""Initialisations that take something off the weights themselves: the file alone does not say what, and diffusers
refuses it. (Of "lora_ga" it takes the matrices as they are.)"""
_UNCOVERED = ("use_qalora", "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config")


@dataclass(frozen=True, slots=True)
class Settings:
    """``alphas`` and ``ranks`` are by regular expressions for the ends of modules' names; ``feedforward`` are the
    modules whose inputs (IA)^3 scales, a regular expression or the ends of their names."""

    alpha: float
    rank: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    feedforward: str | Sequence[str] = ()

    def scale(self, module: str, rank: int | None) -> float:
        """By which a layer's product is multiplied; ``rank`` as its matrices have it, None where they have none."""
        alpha = _matching(self.alphas, module, self.alpha)
        rank = rank or int(_matching(self.ranks, module, self.rank or 0))
        if rank < 1:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def scales_input(self, module: str) -> bool:
        """Whether (IA)^3 scales what goes into the module, not what comes out of it."""
        if isinstance(self.feedforward, str):
            return re.fullmatch(self.feedforward, module) is not None
        return module.endswith(tuple(self.feedforward))


def beside(path: Path) -> Settings | None:
    """From the adapter_config.json of the folder that an adapter lies in; None where there is no such file."""
    _, *configs = files(path)
    return _parse(strict_json.read_object(configs[0], CheckpointError), configs[0]) if configs else None


def files(path: Path) -> tuple[Path, ...]:
    """An adapter's file, and the settings that belong to it where there are any."""
    config = path.parent / CONFIG_NAME
    has_settings = path.name.startswith("adapter_model") and is_there(config, CheckpointError)
    return (path, config) if has_settings else (path,)


def in_header(path: Path, header: Mapping[str, Any]) -> dict[str, Settings]:
    """By subfolder, from the metadata of a .safetensors file."""
    flat = strict_json.parse_object(str(header.get(METADATA_KEY, "{}")), f"{path}: its metadata", CheckpointError)
    return {
        network: _parse({key.removeprefix(f"{network}."): value for key, value in flat.items()}, path)
        for network in {key.split(".")[0] for key in flat}
    }


def _parse(values: Mapping[str, Any], path: Path) -> Settings:
    try:
        return _settings(values)
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: adapter settings that cannot be read: {said}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _settings(values: Mapping[str, Any]) -> Settings:
    kind = values.get("peft_type") or "LORA"
    if kind not in TYPES:
        raise InputError(f"an adapter of type {kind}, which is not covered: expected one of {', '.join(TYPES)}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING):
        raise InputError(
            f"made with init_lora_weights {start!r}, which changes the checkpoint's weights as well: expected an "
            "adapter that peft saved with path_initial_model_for_weight_conversion"
        )
    if (named := next((name for name in _UNCOVERED if values.get(name)), None)) is not None:
        raise InputError(f"made with {named}, which is not covered")
    if kind == "IA3":
        feedforward = values.get("feedforward_modules") or ()
        return Settings(1.0, feedforward=feedforward if isinstance(feedforward, str) else tuple(feedforward))
    alpha = values.get("lora_alpha") if kind == "LORA" else values.get("alpha")
    if alpha is None:
        raise ValueError("alpha is missing")
    rank = values.get("r")
    return Settings(
        float(alpha),
        None if rank is None else int(rank),
        _patterns(values.get("alpha_pattern")),
        _patterns(values.get("rank_pattern")),
        bool(values.get("use_rslora")),
    )


def _patterns(values: Mapping[str, Any] | None) -> dict[str, float]:
    found = {pattern: float(value) for pattern, value in (values or {}).items()}
    for pattern in found:
        re.compile(pattern)
    return found


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first pattern's value that matches, as peft matches: the end of the name, from a dot on. transformers 5
    dropped ``text_model.``; patterns are older than that or not."""
    bare = module.removeprefix("text_model.")
    names = (module, bare, f"text_model.{bare}")
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default
