"""Model families, told apart by configurations alone. To add one: an entry of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_runtime.errors import CheckpointError, InputError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family apart. ``v2``: its UNet attends to SD 2's text encoder; None matches either.
    ``latent_factor``: by how much its VAE's pictures are larger than their latents."""

    name: str
    title: str
    in_channels: int
    v2: bool | None = None
    prediction_types: tuple[str, ...] = ("epsilon",)
    class_labels: bool = False
    latent_factor: int = 8


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("sd1", "Stable Diffusion 1", 4, v2=False, prediction_types=("epsilon", "v_prediction")),
        Family("sd1-inpainting", "Stable Diffusion 1 in-painting", 9, v2=False),
        Family("sd2-base", "Stable Diffusion 2 base", 4, v2=True),
        Family("sd2-v", "Stable Diffusion 2 768-v", 4, v2=True, prediction_types=("v_prediction",)),
        Family("sd2-inpainting", "Stable Diffusion 2 in-painting", 9, v2=True),
        Family("sd2-depth", "Stable Diffusion 2 depth", 5),
        Family("x4-upscaler", "Stable Diffusion x4 upscaler", 7, None, ("v_prediction", "epsilon"), True, 4),
    )
}


OTHER_KINDS: Mapping[str, str] = {
    "addition_embed_type": "Stable Diffusion XL",
    "time_cond_proj_dim": "a latent consistency model, which is told the guidance scale",
    "encoder_hid_dim_type": "states of other encoders than CLIP's text encoder",
}
"""Keys of a UNet's configuration that say that it has inputs which no family here has."""


def refuse_other_kinds(unet: Config, where: str) -> None:
    """Raises CheckpointError for a UNet with inputs that no family has: without them, it is another network."""
    for key, kind in OTHER_KINDS.items():
        if unet.get(key) is not None:
            raise CheckpointError(
                f"{where}: a UNet with {key} {unet[key]!r} ({kind}) is not supported; supported are {known()}"
            )


def detect(unet: Config, scheduler: Config, where: str) -> str:
    """The name of the family that a UNet and a scheduler belong to. Raises CheckpointError, with what was seen."""
    seen = (
        int(unet.get("in_channels", 4)),
        bool(unet.get("use_linear_projection", False)) or unet.get("cross_attention_dim") == 1024,
        str(scheduler.get("prediction_type", "epsilon")),
        _embeds_classes(unet),
    )
    for family in FAMILIES.values():
        if _is_one(family, *seen):
            return family.name
    near = [family.name for family in FAMILIES.values() if _takes(family, unet)]
    raise CheckpointError(
        f"{where}: of no known family: the UNet has {seen[0]} input channels, "
        f"{unet.get('cross_attention_dim')} context channels, prediction type {seen[2]}"
        f"{' and class embeddings' if seen[3] else ''}; known are {known()}"
        + (f"; --family may name {' or '.join(near)}" if near else "")
    )


def check_family(name: str, unet: Config, where: str) -> str:
    """``name``, asked for in place of what would be detected. Raises InputError for an unknown family, with the
    known ones, and for one whose UNets have other inputs."""
    if name not in FAMILIES:
        raise InputError(f"unknown family {name!r}: expected one of {known()}")
    if not _takes(FAMILIES[name], unet):
        near = [family.name for family in FAMILIES.values() if _takes(family, unet)]
        raise InputError(
            f"{where}: family {name!r} does not fit a UNet with {unet.get('in_channels', 4)} input channels"
            f"{' and class embeddings' if _embeds_classes(unet) else ''}: "
            f"expected {' or '.join(near) or 'no family that is known'}"
        )
    return name


def known() -> str:
    return ", ".join(FAMILIES)


def _takes(family: Family, unet: Config) -> bool:
    """Whether a UNet has the inputs of the family's."""
    return (int(unet.get("in_channels", 4)), _embeds_classes(unet)) == (family.in_channels, family.class_labels)


def _embeds_classes(unet: Config) -> bool:
    return unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None


def _is_one(family: Family, in_channels: int, v2: bool, prediction: str, class_labels: bool) -> bool:
    return (
        in_channels == family.in_channels
        and family.v2 in (None, v2)
        and prediction in family.prediction_types
        and class_labels == family.class_labels
    )


def latent_factor(vae: Config) -> int:
    """How many times larger than its latents a VAE's picture is, on each side."""
    return int(2 ** (len(vae.get("block_out_channels", (64,))) - 1))


def latent_scale(vae: Config) -> float:
    """What latents are multiplied by on the way into the UNet; configurations that do not say mean 0.18215, the
    default of AutoencoderKL."""
    return float(vae.get("scaling_factor") or 0.18215)


def default_size(unet: Config, vae: Config) -> tuple[int, int]:
    """Height and width in pixels that a checkpoint is for. Configurations from before diffusers 0.9 say 32 where
    64 is meant (diffusers reads them so, too)."""
    sample: Callable[[Any], tuple[int, int]] = lambda size: (size, size) if isinstance(size, int) else tuple(size)  # noqa: E731
    height, width = sample(unet.get("sample_size") or 64)
    version = tuple(
        int(part) for part in str(unet.get("_diffusers_version", "1.0")).split(".")[:2] if part.isdigit()
    )
    if version < (0, 9) and max(height, width) < 64 and "_diffusers_version" in unet:
        height = width = 64
    factor = latent_factor(vae)
    return height * factor, width * factor
