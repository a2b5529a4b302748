"""Which apps can run which models: one table of apps and what they have fixed.

The model card and README's table of compatibility are made of it. What is said here was read in the apps' public
sources or measured with them; to add an app, or what it lacks, is to add an entry.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffusion_runtime.families import LATENT_SCALE, Layout


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
    does, with the keys of `how_to_run.place_of` in it; empty: the card says it elsewhere. ``steer``: the same for
    ControlNets. ``kinds``: what it reads.
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

_COMFYUI_1 = Client("ComfyUI-CoreMLSuite 1.x", _COMFYUI, _IN_COMFYUI, _STEER_COMFYUI, kinds=("packages",))

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
    _COMFYUI_1,
    replace(_COMFYUI_1, name="ComfyUI-CoreMLSuite 2.x", layout=Layout.COMFYUI),
    Client("coreml-sd", {}, kinds=("packages", "compiled")),
)
