"""What there is, once: attention kinds, model families, components, systems, bit widths.

Everything else reads these tables, `diffusion_convert` too. To add one is to add an entry here, and the file that
the entry's docstring names.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Attention:
    """What is known of an attention kind.

    ``compute_units``: those that its UNet is made for. ``devices``: for whom, in the words of the model card.
    ``einsum``: its programs have einsum operations. ``query_chunk``: they take the queries so many at a time (None:
    all at once). ``stands_in_for``: the kind that apps ask for when they can use this one: its zip is written under
    that name, too, where there are no models of that kind. ``mark``: what files are called by in
    `Layout.COMFYUI` (None: by the kind's own name).
    """

    compute_units: str
    devices: str
    einsum: bool = False
    query_chunk: int | None = None
    stands_in_for: str | None = None
    mark: str | None = None


class AttentionKind(enum.Enum):
    """The attention kinds, the better ones first."""

    ORIGINAL = "original"
    SPLIT_EINSUM_V2 = "split_einsum_v2"
    SPLIT_EINSUM = "split_einsum"

    @property
    def about(self) -> Attention:
        return _ATTENTION[self]


_ATTENTION: Mapping[AttentionKind, Attention] = {
    AttentionKind.ORIGINAL: Attention(
        "cpu-and-gpu", "Macs with a strong GPU (M1 Pro, Max, Ultra and later)", mark="orig"
    ),
    AttentionKind.SPLIT_EINSUM_V2: Attention(
        "cpu-and-ne",
        "iPhone, iPad and Macs with iOS 17 / macOS 14",
        einsum=True,
        query_chunk=512,
        stands_in_for="split_einsum",
        mark="se2",
    ),
    AttentionKind.SPLIT_EINSUM: Attention(
        "cpu-and-ne", "iPhone, iPad, and Macs for low power", einsum=True, mark="se"
    ),
}
"""To add one: a member above, an entry here, and a file of its name in `diffusion_convert/networks/attention/`."""

ATTENTIONS: tuple[str, ...] = tuple(kind.value for kind in AttentionKind)
PROCESSORS: Mapping[str, str] = {"cpu-and-gpu": "GPU", "cpu-and-ne": "Neural Engine"}
"""The compute unit that an attention kind uses in addition to the CPU."""


def preferred(compute_units: str | None) -> tuple[AttentionKind, ...]:
    """The attention kinds, the best for these compute units first. None and "all" are taken for the Neural Engine,
    which Core ML then uses; without it, the GPU's kinds are better."""
    wanted = "cpu-and-ne" if compute_units in (None, "all", "cpu-and-ne") else "cpu-and-gpu"
    return tuple(sorted(AttentionKind, key=lambda kind: kind.about.compute_units != wanted))


def attention_of(einsums: Iterable[tuple[int | None, ...]]) -> AttentionKind:
    """The attention kind of a program with einsum operations of these result shapes.

    With more keys than a kind's ``query_chunk``, scores (batch, keys, 1, queries) have that many queries.
    """
    shapes = list(einsums)
    alike = [kind for kind in AttentionKind if kind.about.einsum == bool(shapes)]
    for kind in alike:
        chunk = kind.about.query_chunk
        if chunk and any(len(s) == 4 and s[3] == chunk and (s[1] or 0) > chunk for s in shapes):
            return kind
    return next(kind for kind in alike if kind.about.query_chunk is None)


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""CLIP's text encoders by component, in the order in which their states are set side by side."""
T5 = "text_encoder_t5"
"""The text encoder whose states follow those of CLIP's encoders (Stable Diffusion 3)."""
LATENT_SCALE = 0.18215
"""What latents are multiplied by where nothing says otherwise: the default of diffusers' AutoencoderKL."""
_LOW_RES_SCHEDULER: Mapping[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
}


PLAIN_SETTINGS: Mapping[str, Any] = {"steps_offset": 1, "clip_sample": False}
"""`Family.scheduler_settings` of StableDiffusionPipeline and StableDiffusionImg2ImgPipeline."""
INPAINTING_SETTINGS: Mapping[str, Any] = {"steps_offset": 1, "skip_prk_steps": True}
"""Those of StableDiffusionInpaintPipeline."""


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The network that predicts what is taken away in a step.

    ``component``: its name in `COMPONENTS`. ``names``: what its inputs are called where a UNet of Apple's contract
    has other names for them (the UNet's name -> its own). ``patch_size``: of the squares that it cuts latents into.
    ``attention``: the kinds that it can be converted with."""

    component: str = "unet"
    names: Mapping[str, str] = field(default_factory=dict)
    patch_size: int = 1
    attention: tuple[AttentionKind, ...] = tuple(AttentionKind)


UNET = Denoiser()
MMDIT = Denoiser(
    "transformer",
    {
        "sample": "latent_image_embeddings",
        "encoder_hidden_states": "token_level_text_embeddings",
        "text_embeds": "pooled_text_embeddings",
    },
    patch_size=2,
    attention=(AttentionKind.ORIGINAL,),
)
"""Stable Diffusion 3's transformer, as Apple's StableDiffusion3Pipeline feeds it."""


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a model family apart. The defaults are Stable Diffusion 1's.

    ``in_channels``: of the UNet; what pictures it is given follows from them (`tasks`).
    ``text_encoder``: a value of `TEXT_WIDTHS`, by the width of the states that the UNet attends to. It counts where
    another family has the same channels. ``prediction_types``: the usual one first.
    ``class_labels``: the UNet takes some. ``latent_factor``: pictures are so many times larger than latents.
    ``size``: of its pictures, in pixels. ``safety_checker``: checkpoints ask for one.
    ``noise_scheduler``: diffusers' low_res_scheduler, if any.
    ``scheduler_settings``: what diffusers' pipeline class imposes on whatever scheduler it is made with, since the
    published configurations of the first checkpoints lack it or say otherwise.
    ``encoders``: which of `TEXT_ENCODERS` it has.
    ``added_conditions``: the UNet takes time_ids and text_embeds, as SDXL's does.
    ``steps``, ``image_steps`` (with a picture), ``guidance_scale``, ``strength``, ``inpainting_…``: what diffusers'
    pipelines take where none is given.
    ``image_guidance_scale``: the same of a second guidance, by a picture that the UNet sees; None: it has none.
    ``control_scale``, ``…_control_scale``: the same for each control image, by the task; ``controlled``: those of
    the others that are other in its pipelines with ControlNets.
    ``attention``: what is converted where no kind is asked for.
    ``denoiser``: what predicts. ``latent_shift``: see `Latents.shift`.
    ``joint_text``: the states of all CLIP encoders side by side, filled with zeros to the width of T5's, are
    followed by T5's; the pooled states of all CLIP encoders are given, each projected.
    """

    name: str
    title: str
    in_channels: int = 4
    text_encoder: str = "clip"
    prediction_types: tuple[str, ...] = ("epsilon",)
    class_labels: bool = False
    latent_factor: int = 8
    latent_scale: float = LATENT_SCALE
    size: int = 512
    safety_checker: bool = False
    noise_scheduler: Mapping[str, Any] | None = None
    scheduler_settings: Mapping[str, Any] = field(default_factory=lambda: PLAIN_SETTINGS)
    encoders: tuple[str, ...] = TEXT_ENCODERS[:1]
    added_conditions: bool = False
    steps: int = 50
    image_steps: int = 50
    guidance_scale: float = 7.5
    strength: float = 0.8
    inpainting_guidance_scale: float = 7.5
    inpainting_strength: float = 1.0
    image_guidance_scale: float | None = None
    control_scale: float = 1.0
    image_control_scale: float = 0.8
    inpainting_control_scale: float = 0.5
    controlled: Mapping[str, Any] = field(default_factory=dict)
    attention: tuple[AttentionKind, ...] = (AttentionKind.ORIGINAL, AttentionKind.SPLIT_EINSUM_V2)
    denoiser: Denoiser = UNET
    latent_shift: float = 0.0
    joint_text: bool = False

    @property
    def pad_token(self) -> str | None:
        """What prompts are padded with where no tokenizer_config.json says so; None is the tokenizer's own."""
        return "!" if self.text_encoder.startswith("open_clip") else None

    @property
    def guided_rows(self) -> int:
        """How many rows of the UNet's work a guided picture has (`guidance`)."""
        return 2 if self.image_guidance_scale is None else 3


_SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    text_encoder="clip_and_open_clip_big",
    prediction_types=("epsilon", "v_prediction"),
    latent_scale=0.13025,
    size=1024,
    encoders=TEXT_ENCODERS,
    scheduler_settings={},
    added_conditions=True,
    guidance_scale=5.0,
    strength=0.3,
    inpainting_strength=0.9999,
    inpainting_control_scale=1.0,
    controlled={"strength": 0.8, "inpainting_guidance_scale": 5.0},
    attention=(AttentionKind.ORIGINAL,),  # the graphs of the others are huge at 1024x1024
)
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("sd1", "Stable Diffusion 1", prediction_types=("epsilon", "v_prediction"), safety_checker=True),
        Family(
            name="sd1-inpainting",
            title="Stable Diffusion 1 in-painting",
            in_channels=9,
            safety_checker=True,
            scheduler_settings=INPAINTING_SETTINGS,
        ),
        Family(
            name="sd1-pix2pix",
            title="InstructPix2Pix",
            in_channels=8,
            safety_checker=True,
            scheduler_settings={},
            image_steps=100,
            image_guidance_scale=1.5,
        ),
        Family("sd2-base", "Stable Diffusion 2 base", 4, "open_clip"),
        Family("sd2-v", "Stable Diffusion 2 768-v", 4, "open_clip", ("v_prediction",), size=768),
        Family(
            name="sd2-inpainting",
            title="Stable Diffusion 2 in-painting",
            in_channels=9,
            text_encoder="open_clip",
            scheduler_settings=INPAINTING_SETTINGS,
        ),
        Family("sd2-depth", "Stable Diffusion 2 depth", 5, "open_clip", scheduler_settings={}),
        Family(
            name="x4-upscaler",
            title="Stable Diffusion x4 upscaler",
            in_channels=7,
            text_encoder="open_clip",
            prediction_types=("v_prediction", "epsilon"),
            class_labels=True,
            latent_factor=4,
            latent_scale=0.08333,
            noise_scheduler=_LOW_RES_SCHEDULER,
            scheduler_settings={},
            image_steps=75,
            guidance_scale=9.0,
        ),
        _SDXL,
        replace(_SDXL, name="sdxl-inpainting", title="Stable Diffusion XL in-painting", in_channels=9),
        replace(
            _SDXL,
            name="sdxl-pix2pix",
            title="Stable Diffusion XL InstructPix2Pix",
            in_channels=8,
            image_steps=100,
            image_guidance_scale=1.5,
        ),
        replace(
            _SDXL,
            name="sdxl-refiner",
            title="Stable Diffusion XL refiner",
            text_encoder="open_clip_big",
            prediction_types=("epsilon",),
            encoders=TEXT_ENCODERS[1:],
        ),
        Family(
            name="sd3",
            title="Stable Diffusion 3",
            in_channels=16,
            text_encoder="clip_and_t5",
            prediction_types=("flow_prediction",),
            latent_scale=1.5305,
            latent_shift=0.0609,
            size=1024,
            scheduler_settings={},
            encoders=TEXT_ENCODERS,
            steps=28,
            guidance_scale=7.0,
            strength=0.6,
            inpainting_guidance_scale=7.0,
            inpainting_strength=0.6,
            attention=MMDIT.attention,
            denoiser=MMDIT,
            joint_text=True,
        ),
    )
}
"""The families by name. To add one: an entry here; for single files, its configurations in
`diffusion_convert/checkpoint/configs/NAME.json`; for other pictures to start from, a task."""


def family_named(name: str) -> Family:
    """The family of that name; Stable Diffusion 1, whose values are the usual ones, for one that is not known."""
    return FAMILIES.get(name) or FAMILIES["sd1"]


DENOISERS = tuple(dict.fromkeys(family.denoiser.component for family in FAMILIES.values()))
"""The components of which one runs in each step."""
TEXT_WIDTHS: Mapping[int, str] = {
    768: "clip",
    1024: "open_clip",
    1280: "open_clip_big",
    2048: "clip_and_open_clip_big",
}


def family_of(in_channels: int, context: int, latent_size: int, added_conditions: bool = False) -> Family:
    """The family of a UNet of which only the interface is known: its input channels, the width of its states and
    the larger side of its latents. Unknown ones are taken for Stable Diffusion 1.

    Among families with the same interface, the one whose usual pictures are the largest that fit is meant."""
    encoder = TEXT_WIDTHS.get(context, "clip")
    alike = [
        family
        for family in FAMILIES.values()
        if (family.denoiser, family.in_channels, family.added_conditions) == (UNET, in_channels, added_conditions)
    ]
    alike = [family for family in alike if family.text_encoder == encoder] or alike
    if not alike:
        return FAMILIES["sd1"]
    by_size = sorted(alike, key=lambda family: family.size)
    return [by_size[0], *(one for one in by_size if one.size <= latent_size * one.latent_factor)][-1]


@dataclass(frozen=True, slots=True)
class ComponentNames:
    """``compiled``: what apps look for. ``subfolder``: the network's folder in a checkpoint of diffusers.
    ``package``: how Apple's converter calls its package after the checkpoint's name (None: as the component).
    ``several``: there is one for each network of a kind, which has a name of its own after this prefix: that of
    its component, of its package, and of its network in the checkpoint; ``compiled`` is then their folder."""

    compiled: str
    subfolder: str
    package: str | None = None
    several: str | None = None


COMPONENTS: Mapping[str, ComponentNames] = {
    "text_encoder": ComponentNames("TextEncoder", "text_encoder"),
    "text_encoder_2": ComponentNames("TextEncoder2", "text_encoder_2"),
    T5: ComponentNames("TextEncoderT5", "text_encoder_3"),
    "transformer": ComponentNames("MultiModalDiffusionTransformer", "transformer"),
    "unet": ComponentNames("Unet", "unet"),
    "control_unet": ComponentNames("ControlledUnet", "unet", package="control-unet"),
    "refiner": ComponentNames("UnetRefiner", "refiner"),
    "controlnet": ComponentNames("controlnet", "controlnet", several="ControlNet_"),
    "vae_decoder": ComponentNames("VAEDecoder", "vae"),
    "vae_encoder": ComponentNames("VAEEncoder", "vae"),
    "preview_vae_decoder": ComponentNames("PreviewVAEDecoder", "preview_vae"),
    "safety_checker": ComponentNames("SafetyChecker", "safety_checker"),
    "depth_estimator": ComponentNames("DepthEstimator", "depth_estimator"),
    "t2i_adapter": ComponentNames("adapters", "t2i_adapter", several="T2IAdapter_"),
    "image_encoder": ComponentNames("ImageEncoder", "image_encoder"),
    "image_projection": ComponentNames("ImageProjection", "image_projection"),
}
"""The components, in the order in which they are converted. To add one: an entry here, and a file of its name in
`diffusion_convert/components/`."""
UNETS = ("unet", "control_unet")
"""The components that a checkpoint's own UNet becomes: alone, and with the inputs that ControlNets feed."""
CHUNKED = (*UNETS, "refiner")
"""The components that can be cut in two."""


def kind_of(component: str) -> str:
    """The entry of `COMPONENTS` that a component is of: "controlnet" of "ControlNet_canny"; else its own name."""
    prefixes = ((kind, names.several) for kind, names in COMPONENTS.items() if names.several)
    return next((kind for kind, prefix in prefixes if component.startswith(prefix)), component)


def own_name(component: str) -> str:
    """What one of several is called among them: "canny" of "ControlNet_canny"."""
    return component.removeprefix(COMPONENTS[kind_of(component)].several or "")


def several(kind: str, components: Iterable[str]) -> dict[str, str]:
    """Those of ``components`` that are of a kind of which there are several, by their own names."""
    return {own_name(name): name for name in components if name != kind and kind_of(name) == kind}


def subfolder_of(component: str) -> str:
    """Where a component's network lies in a checkpoint: in a folder of its kind, or one of several by its name."""
    kind = kind_of(component)
    return component if COMPONENTS[kind].several else COMPONENTS[kind].subfolder


def package_name(checkpoint: str, component: str) -> str:
    """What Apple's converter calls a component's package, without its suffix. ``checkpoint``: its name."""
    names = COMPONENTS[kind_of(component)]
    if names.several:
        return component
    return f"Stable_Diffusion_version_{checkpoint.replace('/', '_')}_{names.package or component}"


def compiled_names(component: str, count: int = 1) -> tuple[str, ...]:
    """The names of a component's compiled models: Unet, or of several that run one after the other UnetChunk1, …;
    of a ControlNet controlnet/Canny."""
    names = COMPONENTS[kind_of(component)]
    whole = f"{names.compiled}/{_title(own_name(component))}" if names.several else names.compiled
    return (whole,) if count == 1 else tuple(f"{whole}Chunk{number}" for number in range(1, count + 1))


def _title(name: str) -> str:
    """``lllyasviel_sd-controlnet-canny`` -> ``LllyasvielSdControlnetCanny``, as Apple's converter does."""
    return "".join(word.title() for word in re.split("[_-]", name))


class Layout(enum.Enum):
    """Whose interface models have. ``apple``: of Apple's clients, and what the runtime runs; ``comfyui``: of
    ComfyUI-CoreMLSuite 2.x. To add one: a member here, and an entry in `diffusion_convert.layouts`."""

    APPLE = "apple"
    COMFYUI = "comfyui"


@dataclass(frozen=True, slots=True)
class System:
    """The systems of one version of Core ML's specification, as coremltools calls them. ``converts``: packages can
    be made for them. ``availability`` by platform, as Apple's compiler writes it; ``writer``: a number in its
    coremldata.bin whose meaning is not known. Both are None where no compiled model of that version was ever seen:
    then ours cannot make one."""

    macos: str
    ios: str
    converts: bool = True
    availability: Mapping[str, str] | None = None
    writer: int | None = None

    @property
    def title(self) -> str:
        return f"{self.macos} {self.ios}"


def _platforms(macos: str, ios: str, vision: str, watch: str) -> Mapping[str, str]:
    return {"macOS": macos, "tvOS": ios, "visionOS": vision, "watchOS": watch, "iOS": ios, "macCatalyst": ios}


SYSTEMS: Mapping[int, System] = {
    6: System("macOS12", "iOS15", False, _platforms("12.0", "15.0", "1.0", "8.0"), 5),
    7: System("macOS13", "iOS16", True, _platforms("13.0", "16.0", "1.0", "9.0"), 5),
    8: System("macOS14", "iOS17", True, _platforms("14.0", "17.0", "1.0", "10.0"), 8),
    9: System("macOS15", "iOS18", True, _platforms("15.0", "18.0", "2.0", "11.0"), 9),
    10: System("macOS26", "iOS26"),
}
"""By version of Core ML's specification."""
TARGETS: Mapping[str, int] = {
    **{system.macos: version for version, system in SYSTEMS.items() if system.converts},
    **{system.ios: version for version, system in SYSTEMS.items() if system.converts},
}
"""The systems that can be converted for, and their version of the specification."""
DEFAULT_TARGET = next(iter(TARGETS))


def compiles(specification: int) -> bool:
    """Whether the form of compiled models of that version is known."""
    return specification in SYSTEMS and SYSTEMS[specification].availability is not None


PALETTE_BITS = (1, 2, 3, 4, 6, 8)
"""Bits per palettized weight that Core ML has; 3 from specification version 9 on."""
