"""What models ask of an app, told by their manifest. The needs and the apps that lack them are in `clients`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from diffusion_convert.bundle.clients import Needs
from diffusion_runtime import schedulers
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.bundle.views import as_unet, text_tokens
from diffusion_runtime.families import LATENT_SCALE, TEXT_ENCODERS, family_named

_BY_CHANNELS: Mapping[int, Needs] = {9: Needs.IN_PAINTING, 5: Needs.DEPTH, 7: Needs.UPSCALING, 8: Needs.EDITING}
_PLAIN_CHANNELS = 4
_AESTHETIC_TIME_IDS = 5
_SHIFT = 3.0
"""Of the noise levels of Apple's scheduler for flow matching, unless an app sets another."""


def needs_of(made: Manifest) -> frozenset[Needs]:
    """What the models of a manifest ask of an app."""
    return frozenset((*_needs_of_unet(made), *_needs_of_prompts(made), *_needs_of_arithmetic(made)))


def controls_of(made: Manifest) -> frozenset[Needs]:
    """What its ControlNets ask of an app in addition; nothing where there are none."""
    unet = made.components.get("control_unet")
    if unet is None:
        return frozenset()
    inputs = {tensor.name: tensor.shape for tensor in unet.inputs}
    so = {
        Needs.CONTROLNETS: True,
        Needs.CONTROLNETS_XL: "time_ids" in inputs,
        Needs.CONTROLNETS_OF_ONE: inputs.get("sample", (2,))[0] == 1,
        Needs.CONTROL_CHUNKS: len(unet.files) > 1,
    }
    return frozenset(need for need, is_so in so.items() if is_so)


def _needs_of_unet(made: Manifest) -> Iterator[Needs]:
    unet = made.unet
    if unet is None:
        yield from _needs_of_transformer(made)
        return
    shapes = {tensor.name: tensor.shape for tensor in unet.inputs}
    channels = shapes.get("sample", (0, _PLAIN_CHANNELS))[1]
    if channels != _PLAIN_CHANNELS:
        yield _BY_CHANNELS.get(channels, Needs.OTHER_INPUTS)
    elif "class_labels" in shapes or made.ip_adapters or made.t2i_adapters:
        yield Needs.OTHER_INPUTS
    if "time_ids" in shapes:
        yield Needs.REFINER if shapes["time_ids"][-1] == _AESTHETIC_TIME_IDS else Needs.SDXL
    if "timestep_cond" in shapes:
        yield Needs.GUIDANCE_INPUT
    if len(unet.files) > 1:
        yield Needs.CHUNKS
    if "unet" not in made.components:
        yield Needs.ONLY_CONTROLLED
        yield from controls_of(made) - {Needs.CONTROLNETS}


def _needs_of_transformer(made: Manifest) -> Iterator[Needs]:
    if _is_joint(made):
        yield Needs.SD3
        unet = as_unet(made).components.get("unet")
        rows = {tensor.shape[0] for tensor in unet.inputs} if unet is not None else {2}
        if rows != {2} or text_tokens(made) != 2 * tokens_of_encoder(made):
            yield Needs.SD3_SHAPES


def _is_joint(made: Manifest) -> bool:
    return family_named(made.family).joint_text


def _needs_of_prompts(made: Manifest) -> Iterator[Needs]:
    family = family_named(made.family)
    if family.encoders == TEXT_ENCODERS[:1]:
        first = TEXT_ENCODERS[0]
        usual = {} if family.pad_token is None else {first: 0}
        own = made.folded.padding or (usual if made.padding is None else made.padding)
        if own.get(first) != 0:
            yield Needs.NOT_FOR_PADDING_0
        if first in own and first not in (made.folded.padding or {}):
            yield Needs.PADS_OTHERWISE
        if family.pad_token is not None:
            yield Needs.STATES_1024
    if not _is_joint(made) and tokens_of_unet(made) != tokens_of_encoder(made):
        yield Needs.LONG_PROMPTS


def _needs_of_arithmetic(made: Manifest) -> Iterator[Needs]:
    family = family_named(made.family)
    of_its_own = family.added_conditions or family.joint_text
    fixed = (family.latent_scale, family.latent_shift) if of_its_own else (LATENT_SCALE, 0.0)
    if (made.latents.scale, made.latents.shift) != fixed:
        yield Needs.LATENT_SCALE
    if made.folded.latents is not None:
        yield Needs.OWN_LATENT_SCALE
    if made.folded.prediction_type is not None:
        yield Needs.FOLDED_PREDICTION
    if _is_joint(made):
        if made.scheduler.get("use_dynamic_shifting") or made.scheduler.get("shift") != _SHIFT:
            yield Needs.NOISE_LEVELS
    elif made.prediction_type not in ("epsilon", "v_prediction"):
        yield Needs.OTHER_PREDICTION
    elif not schedulers.has_usual_noise({"prediction_type": made.prediction_type, **made.scheduler}):
        yield Needs.NOISE_LEVELS
    elif made.prediction_type != "epsilon":
        foldable = schedulers.has_signal(made.scheduler, made.family)
        yield Needs.V_PREDICTION if foldable else Needs.ZERO_SNR


def tokens_of_encoder(made: Manifest) -> int:
    """How many tokens the text encoder takes; 0 where there is none."""
    encoder = next(
        (made.components[name] for name in ("text_encoder", "text_encoder_2") if name in made.components), None
    )
    return 0 if encoder is None else next((tensor.shape[-1] for tensor in encoder.inputs), 0)


def tokens_of_unet(made: Manifest) -> int:
    """How many text tokens the UNet takes of the text encoder's states; where it is not known, as many as that
    gives."""
    length = tokens_of_encoder(made)
    if _is_joint(made):
        return length  # T5's follow
    return (text_tokens(made) or length) if length else length
