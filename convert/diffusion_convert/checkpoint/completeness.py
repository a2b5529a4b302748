"""Whether weights are those of a network: all there, none too many, each of its shape. Found before work starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_OPTIONAL_PREFIX = "text_model."
"""transformers 5 dropped it from CLIPTextModel's own names; the published weights have it."""

_SHOWN = 5


def check(class_name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError unless ``tensors`` are the weights of the network that ``config`` describes."""
    expected = {name: tuple(value.shape) for name, value in network(class_name, config).state_dict().items()}
    found = {name.removeprefix(_OPTIONAL_PREFIX): tuple(value.shape) for name, value in tensors.items()}
    expected = {name.removeprefix(_OPTIONAL_PREFIX): shape for name, shape in expected.items()}
    wrong = [
        f"{name} {found[name]} in place of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has no place for", sorted(found.keys() - expected.keys())),
        ("has other shapes:", wrong),
    ):
        if names:
            raise CheckpointError(f"the {class_name} {problem} {listed(names)}")


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def network(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The network without storage for its weights."""
    import diffusers
    import torch
    import transformers

    network: torch.nn.Module
    try:
        with torch.device("meta"):
            if hasattr(diffusers, class_name):
                network = getattr(diffusers, class_name).from_config(dict(config))
            else:
                kind = getattr(transformers, class_name)
                network = kind(kind.config_class(**{k: v for k, v in config.items() if k != "architectures"}))
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"no {class_name} can be built from its configuration: {error}") from error
    return network
