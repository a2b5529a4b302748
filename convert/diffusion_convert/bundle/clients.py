"""Which apps can run which models: one table of apps and what they have fixed.

The model card and README's table of compatibility are made of it. What is said here was read in the apps' public
sources or measured with them; to add an app, or what it lacks, is to add an entry.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from diffusion_runtime import schedulers
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.manifest import Manifest, as_unet
from diffusion_runtime.families import FAMILIES, LATENT_SCALE, Layout


class Needs(enum.Enum):
    """What a model can ask of an app. The value says what is so about the model, for the reason on its card."""

    SDXL = "two text encoders, and sizes and a pooled state as further inputs"
    REFINER = "it goes on from a picture of Stable Diffusion XL, with an aesthetic score as input"
    IN_PAINTING = "the UNet takes a mask and a masked picture: 9 channels"
    DEPTH = "the UNet takes a depth map: 5 channels"
    UPSCALING = "the UNet takes a small picture and how much noise it was given: 7 channels"
    EDITING = "the UNet takes the latents of a picture, and a picture and a prompt guide it: 8 channels, three rows"
    OTHER_INPUTS = "the UNet takes inputs of its own"
    GUIDANCE_INPUT = "the guidance scale is an input of the UNet"
    LATENT_SCALE = "latents have another scale"
    OWN_LATENT_SCALE = "latents of the checkpoint have another scale, which is folded into the VAE"
    NOT_FOR_PADDING_0 = 'prompts are not padded with "!", token 0'
    PADS_OTHERWISE = "prompts are not padded with <|endoftext|>"
    V_PREDICTION = "the UNet predicts v"
    OTHER_PREDICTION = "the UNet predicts neither noise nor v"
    FOLDED_PREDICTION = "the UNet predicts noise, where the checkpoint's own predicts v"
    ZERO_SNR = (
        "the UNet predicts v, and its noisiest step has no signal left, so that v cannot be folded into noise"
    )
    NOISE_LEVELS = "the noise levels are EDM's or of flow matching"
    LONG_PROMPTS = "the UNet takes more text tokens than the text encoder gives"
    CHUNKS = "the UNet is cut in two"
    STATES_1024 = "text states are Stable Diffusion 2's"
    PICTURE = "a picture to start from"
    SD3 = "a transformer of Stable Diffusion 3 in place of a UNet"
    SD3_SHAPES = "that transformer takes other rows or text tokens than Apple's apps give"
    CONTROLNETS = "pictures that steer, through ControlNets"
    CONTROLNETS_XL = "ControlNets of Stable Diffusion XL"
    CONTROLNETS_OF_ONE = "ControlNets with a batch of one"
    CONTROL_CHUNKS = "the UNet that ControlNets steer is cut in two"
    ONLY_CONTROLLED = "there is no UNet but the one that ControlNets steer"


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """An app or program that runs models.

    ``lacks``: what it cannot do, and why, as the end of a sentence about it. ``how``: what a user of these models
    does, with the fields of `Place` in it; empty: the card says it elsewhere. ``steer``: the same for ControlNets.
    ``kinds``: what it reads.
    """

    name: str
    lacks: Mapping[Needs, str]
    how: str = ""
    steer: str = ""
    layout: Layout = Layout.APPLE
    kinds: tuple[str, ...] = ("compiled",)

    def obstacles(self, needs: frozenset[Needs]) -> tuple[str, ...]:
        """Why it cannot run a model with these needs; empty where it can."""
        return tuple(dict.fromkeys(why for need, why in self.lacks.items() if need in needs))


_EPSILON = "takes what the UNet predicts for noise, where these models predict v"
_NO_PICTURES_IN = "has no inputs for what its UNet takes in addition to latents"
_FIXED_BY_APPLE: Mapping[Needs, str] = {
    Needs.IN_PAINTING: _NO_PICTURES_IN,
    Needs.DEPTH: _NO_PICTURES_IN,
    Needs.UPSCALING: _NO_PICTURES_IN,
    Needs.EDITING: _NO_PICTURES_IN,
    Needs.OTHER_INPUTS: _NO_PICTURES_IN,
    Needs.GUIDANCE_INPUT: "does not give the UNet the guidance scale",
    Needs.LATENT_SCALE: f"has the scale of latents fixed at {LATENT_SCALE} (Stable Diffusion XL: 0.13025)",
    Needs.PADS_OTHERWISE: "pads prompts with <|endoftext|>, which these models were not trained with",
    Needs.ZERO_SNR: f"{_EPSILON}, whose noisiest step has no signal left (`--fold prediction` is impossible)",
    Needs.V_PREDICTION: f"{_EPSILON} (convert with `--fold prediction`)",
    Needs.OTHER_PREDICTION: "takes what the UNet predicts for noise or v, and these models predict neither",
    Needs.NOISE_LEVELS: "has the noise levels of Stable Diffusion fixed, where these models have others",
    Needs.LONG_PROMPTS: "encodes one piece of a prompt, where these models take several",
    Needs.SD3_SHAPES: "gives transformers two rows of 154 text tokens (convert without --batch-size and "
    "--context-length)",
    Needs.CONTROLNETS_XL: "gives ControlNets none of the sizes and states that those of Stable Diffusion XL take",
    Needs.CONTROLNETS_OF_ONE: "gives ControlNets timesteps of two rows in any case (convert with a batch of two)",
}
"""Apple's Swift package, and every app that is built on it."""


def _without(lacks: Mapping[Needs, str], *needs: Needs) -> dict[Needs, str]:
    return {need: why for need, why in lacks.items() if need not in needs}


_NO_TRANSFORMERS = "runs UNets alone"
_BESIDE_BASE = "runs a refiner beside its base only: put its `Unet.mlmodelc` there, as `UnetRefiner.mlmodelc`"
_OF_CONTROLNETS = (Needs.CONTROLNETS_XL, Needs.CONTROLNETS_OF_ONE)
_OWN_VAE = "decodes with the checkpoint's own VAE, at a scale fixed at 0.18215"
_COMFYUI: Mapping[Needs, str] = {
    **_without(_FIXED_BY_APPLE, Needs.GUIDANCE_INPUT, Needs.PADS_OTHERWISE, *_OF_CONTROLNETS),
    Needs.STATES_1024: "knows Stable Diffusion 1 and XL alone",
    Needs.CHUNKS: "does not run a UNet that is cut in two",
    Needs.CONTROL_CHUNKS: "does not run a UNet that is cut in two",
    Needs.LATENT_SCALE: _OWN_VAE,
    Needs.OWN_LATENT_SCALE: _OWN_VAE,
    Needs.SD3: _NO_TRANSFORMERS,
}
_IN_COMFYUI = """put the UNet's `.mlpackage` of `{attention}/packages` into `models/unet` and choose it in the node
"Load Core ML UNet"; text encoder and VAE are those of the checkpoint itself."""
_NO_CONTROLNETS = "draws without ControlNets"
_STEER_COMFYUI = """choose the UNet's package for ControlNets (`control-unet`, `_cn_`) in that node, and ControlNets
and their pictures in ComfyUI's own nodes, which feed the UNet."""
_ENCODER_INPUT = "looks for an input `z` of the VAE encoder, which is called `x` here and in Apple's models"

CLIENTS: tuple[Client, ...] = (
    Client(
        "Apple's ml-stable-diffusion (Swift)",
        _FIXED_BY_APPLE,
        """takes the folder of compiled models that was downloaded as its resources:
`{pipeline}(resourcesAt:…)`{scale} or, in a copy of
[that repository](https://github.com/apple/ml-stable-diffusion), on the command line

```
swift run StableDiffusionSample "a photograph of an astronaut riding a horse" \\
    --resource-path models/{attention}/compiled --compute-units {camel_units}{kind_option}
```""",
        """`StableDiffusionPipeline(resourcesAt:…, controlNet: ["{controlnet_title}"], …)` and pictures as
`configuration.controlNetInputs`; on the command line `--controlnet {controlnet_title}
--controlnet-inputs picture.png`.""",
    ),
    Client(
        "Mochi Diffusion",
        {
            **_FIXED_BY_APPLE,
            Needs.REFINER: _BESIDE_BASE,
            Needs.CONTROL_CHUNKS: "shows no ControlNets where the UNet that they steer is cut in two",
        },
        """unpack a zip of the table above into the app's folder of models (`~/MochiDiffusion/models`) and
choose `{title}` there; take {by_processor}.""",
        """move what is in the folder `controlnet` of the unpacked models into the app's own, which all its models
share (`~/MochiDiffusion/controlnet`), and remove the empty folder: the app puts a link in its place, and shows
those of the model's size and attention.""",
    ),
    Client(
        "Hugging Face's Diffusers app",
        {
            **_FIXED_BY_APPLE,
            Needs.REFINER: _BESIDE_BASE,
            Needs.PICTURE: "draws from prompts alone",
            Needs.CONTROLNETS: _NO_CONTROLNETS,
            Needs.ONLY_CONTROLLED: "draws without ControlNets, and there is no UNet for that here",
        },
        """downloads the zips itself, from the repositories listed in its `ModelInfo.swift`:
add `ModelInfo(modelId: "{repository}", modelVersion: "{title}"{is_kind})`. It asks for zips that are named like the
repository.""",
    ),
    Client(
        "Apple's ml-stable-diffusion (Python)",
        {
            **_without(_FIXED_BY_APPLE, Needs.V_PREDICTION, Needs.ZERO_SNR, Needs.PADS_OTHERWISE),
            Needs.FOLDED_PREDICTION: "takes the checkpoint's own scheduler, which expects v: leave `--fold` out",
            Needs.REFINER: "does not run refiners",
            Needs.SD3: _NO_TRANSFORMERS,
            Needs.CHUNKS: "does not run a UNet that is cut in two",
            Needs.CONTROL_CHUNKS: "does not run a UNet that is cut in two",
            Needs.PICTURE: "draws from prompts alone",
        },
        """takes the folder of packages, and the tokenizer and scheduler of the checkpoint itself:

```
python -m python_coreml_stable_diffusion.pipeline --prompt "a photograph of an astronaut riding a horse" \\
    -i models/{attention}/packages -o . --model-version {source} --compute-unit {upper_units}
```""",
        "`--controlnet {controlnet} --controlnet-inputs picture.png` in addition; several of each, in one order.",
        kinds=("packages",),
    ),
    Client(
        "GuernikaKit",
        {
            **_without(_FIXED_BY_APPLE, Needs.V_PREDICTION, Needs.PADS_OTHERWISE, Needs.GUIDANCE_INPUT),
            Needs.NOT_FOR_PADDING_0: 'pads prompts with "!", which these models were not trained with',
            Needs.SDXL: "looks for `last_hidden_state`, which text encoders of Stable Diffusion XL do not have",
            Needs.REFINER: _ENCODER_INPUT,
            Needs.SD3: _NO_TRANSFORMERS,
            Needs.IN_PAINTING: _ENCODER_INPUT,
            Needs.PICTURE: _ENCODER_INPUT,
            Needs.CONTROLNETS: "looks for residuals under other names (`mid_block_res_sample`, …)",
            Needs.ONLY_CONTROLLED: "looks for `Unet.mlmodelc`",
        },
        """unpack a zip of the table above and remove `VAEEncoder.mlmodelc` from the folder: the app stops
where the encoder's input is not called `z`.""",
    ),
    Client(
        "ComfyUI-CoreMLSuite 1.x",
        _COMFYUI,
        _IN_COMFYUI,
        _STEER_COMFYUI,
        kinds=("packages",),
    ),
    Client(
        "ComfyUI-CoreMLSuite 2.x",
        _COMFYUI,
        _IN_COMFYUI,
        _STEER_COMFYUI,
        layout=Layout.COMFYUI,
        kinds=("packages",),
    ),
    Client("coreml-sd", {}, kinds=("packages", "compiled")),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What `Client.how` can name: the Hub's id of the models, the variant, its compute units as Swift and as
    coremltools spell them, and so on."""

    repository: str
    title: str
    source: str
    attention: str
    camel_units: str
    upper_units: str
    by_processor: str
    pipeline: str
    scale: str
    kind_option: str
    is_kind: str
    controlnet: str = ""
    controlnet_title: str = ""

    def fill(self, text: str) -> str:
        return text.format(**{name: getattr(self, name) for name in self.__slots__})


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
        if rows != {2} or made.text_tokens() != 2 * tokens_of_encoder(made):
            yield Needs.SD3_SHAPES


def _is_joint(made: Manifest) -> bool:
    return made.family in FAMILIES and FAMILIES[made.family].joint_text


def _needs_of_prompts(made: Manifest) -> Iterator[Needs]:
    family = FAMILIES.get(made.family)
    first = next((name for name in family.encoders), "") if family is not None else ""
    if family is not None and first == "text_encoder" and len(family.encoders) == 1:
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
    family = FAMILIES.get(made.family)
    known = family if family is not None and (family.added_conditions or family.joint_text) else None
    fixed = (LATENT_SCALE, 0.0) if known is None else (known.latent_scale, known.latent_shift)
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
    return (made.text_tokens() or length) if length else length


# --- README's table


@dataclass(frozen=True, slots=True)
class Task:
    """A column of README's table: kinds of models as `convert` writes them, and what they ask of an app."""

    title: str
    needs: frozenset[Needs] = field(default_factory=frozenset)


TASKS: tuple[Task, ...] = (
    Task("SD 1", frozenset({Needs.NOT_FOR_PADDING_0})),
    Task("SD 2 base", frozenset({Needs.STATES_1024})),
    Task("SD 2 768-v", frozenset({Needs.STATES_1024, Needs.V_PREDICTION})),
    Task("the same with `--fold prediction`", frozenset({Needs.STATES_1024, Needs.FOLDED_PREDICTION})),
    Task("v, zero SNR", frozenset({Needs.ZERO_SNR})),
    Task("SDXL", frozenset({Needs.SDXL})),
    Task("SD 3", frozenset({Needs.SD3})),
    Task("refiner", frozenset({Needs.REFINER})),
    Task("LCM with a guidance input", frozenset({Needs.NOT_FOR_PADDING_0, Needs.GUIDANCE_INPUT})),
    Task("from a picture", frozenset({Needs.PICTURE})),
    Task("ControlNets of SD 1", frozenset({Needs.CONTROLNETS})),
    Task("ControlNets of SDXL", frozenset({Needs.CONTROLNETS, Needs.CONTROLNETS_XL})),
    Task("in-painting models", frozenset({Needs.IN_PAINTING})),
    Task("depth", frozenset({Needs.DEPTH})),
    Task("x4 upscaler", frozenset({Needs.UPSCALING})),
    Task("InstructPix2Pix", frozenset({Needs.EDITING})),
)


def compatibility_table() -> str:
    """README's table of apps and tasks, in Markdown."""
    rows = [
        ("", *(task.title for task in TASKS)),
        ("---", *("---" for _ in TASKS)),
        *(
            (_named(client), *("no" if client.obstacles(task.needs) else "yes" for task in TASKS))
            for client in CLIENTS
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _named(client: Client) -> str:
    return client.name if client.layout is Layout.APPLE else f"{client.name} (`--layout {client.layout.value}`)"


# --- the card's section


def running(made: Manifest, place: Place, kinds: Collection[str] = KINDS) -> str:
    """What to do with the models in each app that can run them, and one line for each that cannot, in Markdown.
    ``kinds``: what there is of them, packages and compiled models or one of these."""
    needs = needs_of(made)
    others = {client: _obstacles(client, needs, kinds, made.layout) for client in CLIENTS if client.how}
    parts = [f"**{client.name}**: {place.fill(client.how)}" for client, why in others.items() if not why]
    lines = [f"- {client.name}: {'; '.join(why)}." for client, why in others.items() if why]
    if lines:
        parts.append("\n".join(["Not with:", "", *lines]))
    return "\n\n".join(parts)


def steering(made: Manifest, place: Place, kinds: Collection[str] = KINDS) -> str:
    """`running` for the ControlNets of the models; empty where there are none."""
    asked = controls_of(made)
    if not asked or not made.controlnets:
        return ""
    needs = needs_of(made) | asked
    able = [one for one in CLIENTS if one.steer and not _obstacles(one, needs, kinds, made.layout)]
    lines = [f"- {client.name}: {place.fill(client.steer)}" for client in able]
    lines += [
        f"- Not with {client.name}, which {'; '.join(why)}."
        for client in CLIENTS
        if client.how and not _obstacles(client, needs_of(made), kinds, made.layout)
        if (why := client.obstacles(needs))
    ]
    return "\n".join(lines)


def _obstacles(client: Client, needs: frozenset[Needs], kinds: Collection[str], layout: Layout) -> tuple[str, ...]:
    found = client.obstacles(needs)
    if client.layout is not layout:
        another = (
            f" with `--layout {client.layout.value}`"
            if client.layout is not Layout.APPLE
            else " without `--layout`"
        )
        return found or (f"has an interface of its own: convert{another}",)
    if not set(client.kinds) & set(kinds):
        return (*found, f"reads {_KINDS[client.kinds[0]]}")
    return found


_KINDS = {
    "compiled": "compiled models, which are not here: `coreml-sd bundle` makes them",
    "packages": "packages, which are not here",
}
