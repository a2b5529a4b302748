"""The card names an app only where it can run the models, and README's table is made of the same data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from diffusion_convert.bundle.clients import CLIENTS, Client, Needs
from diffusion_convert.bundle.model_card import model_card
from diffusion_convert.bundle.needs import needs_of
from diffusion_runtime.bundle.manifest import Component, Manifest, Tensor
from diffusion_runtime.families import FAMILIES, Layout

README = Path(__file__).resolve().parents[2] / "README.md"
SWIFT, MOCHI, HUGGING_FACE, PYTHON = (client.name for client in CLIENTS[:4])
GUERNIKA, COMFY_1, COMFY_2 = (client.name for client in CLIENTS[4:7])
APPLES = {SWIFT, MOCHI, HUGGING_FACE, PYTHON}
ALL = {SWIFT, MOCHI, HUGGING_FACE, PYTHON, GUERNIKA, COMFY_1, COMFY_2}

SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


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


def made(family: str, scale: float | None = None, **changes: object) -> Manifest:
    """The manifest of a family's models as `convert` writes it."""
    about = FAMILIES[family]
    unet: dict[str, tuple[int, ...]] = {
        "sample": (2, about.in_channels, 64, 64),
        "timestep": (2,),
        "encoder_hidden_states": (2, 768, 1, 77),
    }
    if about.class_labels:
        unet["class_labels"] = (2,)
    if about.added_conditions:
        unet |= {"time_ids": (2, 5 if family == "sdxl-refiner" else 6), "text_embeds": (2, 1280)}
    inputs: dict[str, dict[str, tuple[int, ...]]] = {
        "unet": unet,
        **{name: {"input_ids": (1, 77)} for name in about.encoders},
    }
    components = {
        name: Component(
            files=(f"{name}.mlmodelc",),
            inputs=tuple(Tensor(name=port, dtype="float16", shape=shape) for port, shape in ports.items()),
            outputs=(),
        )
        for name, ports in inputs.items()
    }
    values = {
        "name": "maker/model",
        "family": family,
        "source": {"name": "maker/model", "license": "mit"},
        "kind": "compiled",
        "attention": "original",
        "height": 512,
        "width": 512,
        "batch_size": 2,
        "target": "macOS13",
        "latents": {"channels": 4, "factor": 8, "scale": scale or about.latent_scale},
        "prediction_type": about.prediction_types[0],
        "components": components,
        "scheduler": SCHEDULE,
    }
    return Manifest.model_validate({**values, **changes})


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def components_of_sd3(batch: int = 2, tokens: int = 154) -> dict[str, dict[str, Any]]:
    """Of a manifest: the transformer's and the text encoders' interfaces."""
    transformer: dict[str, tuple[int, ...]] = {
        "latent_image_embeddings": (batch, 16, 64, 64),
        "token_level_text_embeddings": (batch, 4096, 1, tokens),
        "pooled_text_embeddings": (batch, 2048, 1, 1),
        "timestep": (batch,),
    }
    encoders: dict[str, dict[str, tuple[int, ...]]] = {
        name: {"input_ids": (1, 77)} for name in ("text_encoder", "text_encoder_2")
    }
    return {
        name: {
            "files": [f"{name}.mlmodelc"],
            "inputs": [{"name": port, "dtype": "float16", "shape": shape} for port, shape in ports.items()],
            "outputs": [],
        }
        for name, ports in {**encoders, "transformer": transformer}.items()
    }


SD3: dict[str, Any] = {
    "latents": {"channels": 16, "factor": 8, "scale": 1.5305, "shift": 0.0609},
    "scheduler": FLOW,
    "components": components_of_sd3(),
}


def named(manifest: Manifest) -> set[str]:
    """The apps that the card says how to use."""
    text = model_card({"original": manifest}, {})
    return {name for name in ALL if f"\n**{name}**: " in text}


def refused(manifest: Manifest) -> dict[str, str]:
    """The apps that the card says cannot run it, with the reason."""
    lines = model_card({"original": manifest}, {}).splitlines()
    return {name: line for name in ALL for line in lines if line.startswith(f"- {name}: ")}


CARDS = {
    "sd1": (made("sd1"), {SWIFT, MOCHI, HUGGING_FACE, PYTHON, COMFY_1}),
    "sd1 v": (made("sd1", prediction_type="v_prediction"), {PYTHON}),
    "sd1 with a scale of its own": (made("sd1", scale=0.7295), set()),
    "sd2 base, padding not folded": (made("sd2-base"), {PYTHON, GUERNIKA}),
    "sd2 768-v": (made("sd2-v"), {PYTHON, GUERNIKA}),
    "sd2 base, padding folded": (made("sd2-base", folded={"padding": {"text_encoder": 0}}), APPLES | {GUERNIKA}),
    "sd2 768-v, all folded": (
        made(
            "sd2-v",
            prediction_type="epsilon",
            folded={"padding": {"text_encoder": 0}, "prediction_type": "v_prediction"},
        ),
        (APPLES | {GUERNIKA}) - {PYTHON},
    ),
    "sd1 v, folded": (
        made("sd1", prediction_type="epsilon", folded={"prediction_type": "v_prediction"}),
        (APPLES | {COMFY_1}) - {PYTHON},
    ),
    "sd1 with its scale folded": (made("sd1", scale=0.18215, folded={"latents": {"scale": 0.7295}}), APPLES),
    "sd2 zero SNR": (
        made("sd2-v", scheduler={**SCHEDULE, "rescale_betas_zero_snr": True}),
        {PYTHON},
    ),
    "sd2 next to no signal": (
        made("sd2-v", scheduler={**SCHEDULE, "beta_schedule": "squaredcos_cap_v2"}),
        {PYTHON},
    ),
    "sd1, another padding folded": (
        made("sd1", folded={"padding": {"text_encoder": 7}}),
        APPLES | {COMFY_1},
    ),
    "sd2 base, another padding folded": (made("sd2-base", folded={"padding": {"text_encoder": 7}}), APPLES),
    "sd1, another padding not folded": (made("sd1", padding={"text_encoder": 7}), {PYTHON, COMFY_1}),
    "sd1, padding 0 not folded": (made("sd1", padding={"text_encoder": 0}), {PYTHON, GUERNIKA, COMFY_1}),
    "sd2 base that pads as apps do": (made("sd2-base", padding={}), APPLES),
    "sd1 in-painting": (made("sd1-inpainting"), set()),
    "sd2 in-painting": (made("sd2-inpainting"), set()),
    "depth": (made("sd2-depth"), set()),
    "x4": (made("x4-upscaler", latents={"channels": 4, "factor": 4, "scale": 0.08333}), set()),
    "sdxl": (made("sdxl"), {SWIFT, MOCHI, HUGGING_FACE, PYTHON, COMFY_1}),
    "sd1 pix2pix": (made("sd1-pix2pix"), set()),
    "sdxl pix2pix": (made("sdxl-pix2pix"), set()),
    "sdxl in-painting": (made("sdxl-inpainting"), set()),
    "sdxl with EDM's noise levels": (made("sdxl", scheduler={"_class_name": "EDMEulerScheduler"}), set()),
    "sdxl, EDM's, v": (
        made("sdxl", prediction_type="v_prediction", scheduler={"_class_name": "EDMEulerScheduler"}),
        set(),
    ),
    "sdxl by flow matching": (made("sdxl", prediction_type="flow_prediction"), set()),
    "sdxl that predicts the picture": (made("sdxl", prediction_type="sample"), set()),
    "refiner": (made("sdxl-refiner"), {SWIFT, COMFY_1}),
    "sd3": (made("sd3", **SD3), {SWIFT, MOCHI, HUGGING_FACE}),
    "sd3, T5's tokens as diffusers' default": (
        made("sd3", **{**SD3, "components": components_of_sd3(tokens=333)}),
        set(),
    ),
    "sd3, one row": (made("sd3", **{**SD3, "components": components_of_sd3(batch=1)}), set()),
    "sd3, noise levels by the picture's size": (
        made("sd3", **{**SD3, "scheduler": {**FLOW, "use_dynamic_shifting": True}}),
        set(),
    ),
}


@pytest.mark.parametrize("kind", CARDS)
def test_only_apps_that_can_run_a_model_are_named(kind: str) -> None:
    manifest, able = CARDS[kind]
    assert named(manifest) == able
    why = refused(manifest)
    assert why.keys() == ALL - able
    assert all(line.endswith(".") and len(line) > len(name) + 10 for name, line in why.items())


def test_every_family_has_a_card_in_the_test() -> None:
    assert {manifest.family for manifest, _ in CARDS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sd1 v", "convert with `--fold prediction`"),
        ("sd2 zero SNR", "whose noisiest step has no signal left"),
        ("sd2 next to no signal", "whose noisiest step has no signal left"),
        ("sd1 with a scale of its own", "scale of latents fixed at 0.18215"),
        ("sd2 base, padding not folded", "pads prompts with <|endoftext|>"),
        ("sdxl, EDM's, v", "has the noise levels of Stable Diffusion fixed"),
        ("sdxl that predicts the picture", "these models predict neither"),
        ("depth", "has no inputs for what its UNet takes"),
    ],
)
def test_reasons_are_told(kind: str, reason: str) -> None:
    assert reason in refused(CARDS[kind][0])[MOCHI]


def test_a_unet_in_two_and_a_guidance_input() -> None:
    plain = made("sd1")
    unet = plain.components["unet"]
    cut = unet.model_copy(update={"files": ("UnetChunk1.mlmodelc", "UnetChunk2.mlmodelc")})
    chunked = plain.model_copy(update={"components": {**plain.components, "unet": cut}})
    assert named(chunked) == {SWIFT, MOCHI, HUGGING_FACE}
    extra = (*unet.inputs, Tensor(name="timestep_cond", dtype="float16", shape=(2, 256)))
    lcm = unet.model_copy(update={"inputs": extra})
    assert named(plain.model_copy(update={"components": {**plain.components, "unet": lcm}})) == {COMFY_1}


def test_what_is_not_there_is_not_recommended() -> None:
    only = model_card({"original": made("sd1", kind="packages")}, {}, kinds=("packages",))
    assert "- Mochi Diffusion: reads compiled models" in only
    assert f"**{PYTHON}**: " in only
    assert f"- {PYTHON}: reads packages, which are not here" in model_card(
        {"original": made("sd1")}, {}, kinds=("compiled",)
    )


def test_the_card_names_the_variants_that_there_are() -> None:
    text = model_card({"original": made("sdxl")}, {})
    assert "take `original` for the GPU" in text.replace("\n", " ")
    assert "split_einsum" not in text
    for told in ("StableDiffusionXLPipeline", "at 0.13025", "--xl", "isXL: true", "CPU_AND_GPU"):
        assert told in text


OF_CONTROLNETS = {Needs.CONTROLNETS, Needs.CONTROLNETS_XL}
"""Asked for in addition (`controls_of`)."""


def with_controlnets(family: str, batch: int = 2, only: bool = False, chunks: int = 1) -> Manifest:
    """Models of a family with the UNet for ControlNets, and one of them."""
    plain = made(family)
    unet = plain.components["unet"]
    inputs = tuple(one.model_copy(update={"shape": (batch, *one.shape[1:])}) for one in unet.inputs)
    residual = Tensor(name="additional_residual_0", dtype="float16", shape=(batch, 320, 64, 64))
    files = tuple(f"ControlledUnet{number}.mlmodelc" for number in range(chunks))
    steered = unet.model_copy(update={"inputs": (*inputs, residual), "files": files})
    components = {name: one for name, one in plain.components.items() if not (only and name == "unet")}
    told = {"maker_my-canny": {"source": {"name": "maker/my-canny", "license": "openrail"}}}
    return made(family, components={**components, "control_unet": steered}, controlnets=told)


def steers(manifest: Manifest) -> set[str]:
    """The apps that the card says how to use ControlNets with."""
    text = model_card({"original": manifest}, {}).partition("\n## ControlNets\n")[2]
    return {name for name in ALL if f"\n- {name}: " in text}


def test_the_card_says_which_apps_show_controlnets() -> None:
    text = model_card({"original": with_controlnets("sd1")}, {})
    assert "| `maker_my-canny` | `controlnet/MakerMyCanny.mlmodelc` | [maker/my-canny](" in text
    assert '`StableDiffusionPipeline(resourcesAt:…, controlNet: ["MakerMyCanny"], …)`' in text
    assert "`--controlnet maker_my-canny --controlnet-inputs picture.png`" in text
    assert "~/MochiDiffusion/controlnet" in text
    assert f"- Not with {HUGGING_FACE}, which draws without ControlNets." in text
    assert "## ControlNets" not in model_card({"original": made("sd1")}, {})
    assert named(with_controlnets("sd1")) == named(made("sd1"))


@pytest.mark.parametrize(
    ("manifest", "able"),
    [
        (with_controlnets("sd1"), {SWIFT, MOCHI, PYTHON, COMFY_1}),
        (with_controlnets("sdxl"), {COMFY_1}),
        (with_controlnets("sd1", batch=1), {COMFY_1}),
        (with_controlnets("sd1", chunks=2), {SWIFT}),
        (with_controlnets("sd1", only=True), {SWIFT, MOCHI, PYTHON, COMFY_1}),
    ],
    ids=["SD 1", "SDXL", "a batch of one", "in two", "alone"],
)
def test_only_apps_that_can_steer_are_named(manifest: Manifest, able: set[str]) -> None:
    assert steers(manifest) == able


def test_models_without_a_plain_unet() -> None:
    alone = with_controlnets("sd1", only=True)
    assert named(alone) == {SWIFT, MOCHI, PYTHON, COMFY_1}
    assert "there is no UNet for that here" in refused(alone)[HUGGING_FACE]
    assert named(with_controlnets("sd1", only=True, chunks=2)) == {SWIFT}
    assert "cut in two" in refused(with_controlnets("sd1", only=True, chunks=2))[MOCHI]


def test_readmes_table_is_up_to_date() -> None:
    assert compatibility_table() in README.read_text(encoding="utf-8"), f"paste this:\n{compatibility_table()}"


def test_tasks_and_apps_use_every_need() -> None:
    """A need that no app lacks says nothing, and one that no family has is not looked for."""
    lacked = {need for client in CLIENTS for need in client.lacks}
    assert lacked == set(Needs)
    asked = {need for manifest, _ in CARDS.values() for need in needs_of(manifest)}
    assert asked >= {need for task in TASKS for need in task.needs} - {
        Needs.PICTURE,
        Needs.GUIDANCE_INPUT,
        *OF_CONTROLNETS,
    }
