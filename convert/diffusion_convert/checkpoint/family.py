"""The family of a checkpoint, told by its configurations alone, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES, LATENT_SCALE, MMDIT, UNET, Family
from diffusion_runtime.schedulers import FLOW

Config = Mapping[str, Any]
PREDICTIONS = ("epsilon", "v_prediction", "sample", FLOW)
LEAST_LENGTH, TEXT_LENGTH = 8, 77
"""Tokens of a text encoder: of the smallest that takes any words, and of CLIP's."""


OTHER_KINDS: Mapping[str, str] = {
    "addition_embed_type": "added conditions of another kind than Stable Diffusion XL's",
    "encoder_hid_dim_type": "states of other encoders than CLIP's text encoder",
    "encoder_hid_dim": "states of another width than it attends to, which it projects",
}
"""Keys of a UNet's configuration that say that it has inputs which no family here has."""


def refuse_other_kinds(unet: Config, where: str) -> None:
    """Raises CheckpointError for a UNet with inputs that no family has: without them, it is another network."""
    for key, kind in OTHER_KINDS.items():
        if unet.get(key) is not None and unet[key] != "text_time":
            raise CheckpointError(
                f"{where}: a UNet with {key} {unet[key]!r} ({kind}) is not supported; supported are {known()}"
            )
    classes = unet.get("class_embed_type")
    if classes is not None and not any(
        family.class_labels and int(unet.get("in_channels", 4)) == family.in_channels
        for family in FAMILIES.values()
    ):
        kind = (
            "unCLIP, which takes an image's embedding"
            if "projection" in classes
            else "it takes a class of pictures"
        )
        raise CheckpointError(
            f"{where}: a UNet with class_embed_type {classes!r} ({kind}) is not supported; supported are {known()}"
        )


TRANSFORMERS: Mapping[str, str] = {"SD3Transformer2DModel": "sd3"}
"""The family by the class of its transformer, where it has no UNet."""


def of_transformer(class_name: str, asked: str | None, where: str) -> str:
    """The name of the family of a checkpoint with a transformer in place of a UNet. Raises CheckpointError for
    those that are not supported, InputError where another family is ``asked`` for."""
    found = TRANSFORMERS.get(class_name)
    if found is None:
        raise CheckpointError(
            f"{where}: a pipeline around a {class_name} is not supported; supported are {known()}"
        )
    if asked not in (None, found):
        raise InputError(f"{where}: family {asked!r} does not fit a {class_name}: expected {found}")
    return found


def refuse_other_uses(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for networks that diffusers' pipeline of the family uses in a way that is not covered,
    as their configurations ask for."""
    models, xl = checkpoint.models, FAMILIES[checkpoint.family].added_conditions
    asked = {
        "text_encoder: use_attention_mask, by which padding is left out": not xl
        and "text_encoder" in models
        and bool(models["text_encoder"].config.get("use_attention_mask")),
        "transformer: a patch_size that no published model has": "transformer" in models
        and models["transformer"].config.get("patch_size", MMDIT.patch_size) != MMDIT.patch_size,
        "unet: no addition_time_embed_dim, without which sizes cannot be given": xl
        and not models["unet"].config.get("addition_time_embed_dim"),
    }
    if wrong := [what for what, is_so in asked.items() if is_so]:
        raise CheckpointError(f"{checkpoint.name}: its configurations ask for what is not covered: {wrong[0]}")


def of_unet(unet: Config, scheduler: Config, asked: str | None, where: str, parts: Collection[str]) -> str:
    """The name of the family of a checkpoint with a UNet: the one ``asked`` for (`check_family`), else `detect`'s.
    Raises CheckpointError for inputs that no family has."""
    refuse_other_kinds(unet, where)
    return detect(unet, scheduler, where, parts) if asked is None else check_family(asked, unet, where, parts)


def detect(unet: Config, scheduler: Config, where: str, parts: Collection[str]) -> str:
    """The name of the family that a UNet and a scheduler belong to. ``parts``: what else the checkpoint has, by
    diffusers' subfolder. Raises CheckpointError, with what was seen."""
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    near = [family for family in FAMILIES.values() if _takes(family, unet, parts)]
    alike = near
    if {family.text_encoder for family in near} > {"clip"}:
        second = bool(unet.get("use_linear_projection", False)) or unet.get("cross_attention_dim") == 1024
        alike = [family for family in near if family.text_encoder == ("open_clip" if second else "clip")]
    # Families that differ in their prediction alone, as SD 2's at 512 and at 768 pixels.
    for family in alike:
        if prediction in family.prediction_types:
            return family.name
    if alike and prediction in PREDICTIONS:  # unusual, but any pipeline of diffusers draws with it
        return alike[0].name
    raise CheckpointError(
        f"{where}: of no known family: the UNet has {unet.get('in_channels', 4)} input channels, "
        f"{unet.get('cross_attention_dim')} context channels, prediction type {prediction}"
        f"{' and class embeddings' if _embeds_classes(unet) else ''}; known are {known()}"
        + (f"; --family may name {' or '.join(family.name for family in near)}" if near else "")
    )


def check_family(name: str, unet: Config, where: str, parts: Collection[str]) -> str:
    """``name``, asked for in place of what would be detected. Raises InputError for an unknown family, with the
    known ones, and for one whose UNets have other inputs."""
    if name not in FAMILIES:
        raise InputError(f"unknown family {name!r}: expected one of {known()}")
    if not _takes(FAMILIES[name], unet, parts):
        near = [family.name for family in FAMILIES.values() if _takes(family, unet, parts)]
        raise InputError(
            f"{where}: family {name!r} does not fit a UNet with {unet.get('in_channels', 4)} input channels"
            f"{' and class embeddings' if _embeds_classes(unet) else ''}: "
            f"expected {' or '.join(near) or 'no family that is known'}"
        )
    return name


def known() -> str:
    return ", ".join(FAMILIES)


def _takes(family: Family, unet: Config, parts: Collection[str]) -> bool:
    """Whether a UNet has the inputs of the family's, and SDXL's the text encoders that it needs."""
    added = unet.get("addition_embed_type") is not None
    seen = UNET, int(unet.get("in_channels", 4)), _embeds_classes(unet), added
    if seen != (family.denoiser, family.in_channels, family.class_labels, family.added_conditions):
        return False
    return not added or {name for name in parts if name.startswith("text_encoder")} == set(family.encoders)


def _embeds_classes(unet: Config) -> bool:
    return unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None


def latent_factor(vae: Config) -> int:
    """How many times larger than its latents a VAE's picture is, on each side."""
    return int(2 ** (len(vae.get("block_out_channels", (64,))) - 1))


def latent_scale(vae: Config) -> float:
    """What latents are multiplied by on the way into the UNet; configurations that do not say mean
    AutoencoderKL's default."""
    return float(vae.get("scaling_factor") or LATENT_SCALE)


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


LEAST_AREA, MOST_AREA, MOST_ASPECT = 0.6, 1.6, 4.0
"""How far from the size that it was trained for a model still draws well: parts of its pixels, and width to height.
SDXL's own training sizes go from 512x2048 to 2048x512 at about the pixels of 1024x1024."""


def is_untrained(size: tuple[int, int], trained: tuple[int, int]) -> bool:
    """Whether a model for pictures of ``trained`` (height, width) was not made for those of ``size``."""
    area = size[0] * size[1] / (trained[0] * trained[1])
    return not LEAST_AREA <= area <= MOST_AREA or max(size) / min(size) > MOST_ASPECT


def text_length(checkpoint: Checkpoint, subfolder: str | None = None) -> int:
    """How many tokens a text encoder (None: the first one) takes: as many as it has positions, or fewer where the
    tokenizer says so, as diffusers pads prompts to the tokenizer's length. Raises CheckpointError for a damaged
    tokenizer_config.json."""
    named = subfolder or FAMILIES[checkpoint.family].encoders[0]
    encoder = checkpoint.models.get(named)
    positions = TEXT_LENGTH if encoder is None else int(encoder.config.get("max_position_embeddings", TEXT_LENGTH))
    files = checkpoint.tokenizers.get(named, {})
    path = files.get("tokenizer_config.json")
    told = strict_json.read_object(path, CheckpointError).get("model_max_length") if path is not None else None
    return min(told, positions) if isinstance(told, int) and told >= LEAST_LENGTH else positions
