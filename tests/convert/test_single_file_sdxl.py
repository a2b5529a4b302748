"""Single files of Stable Diffusion XL: as diffusers reads them, with published ones' defects, and in parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compvis_layout
from diffusion_convert.checkpoint import ldm_configs, ldm_names
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.single_file import open_single_file
from diffusion_convert.checkpoint.torch_networks import build, check, empty
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import CheckpointError, InputError

Tensors = dict[str, torch.Tensor]
Write = Callable[..., Path]
UNET, VAE, FIRST, SECOND = (
    "model.diffusion_model.",
    "first_stage_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)


@pytest.fixture
def write(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Write:
    """``write("sdxl", change)``: that tiny checkpoint as one file, whose tensors ``change`` has changed."""

    def written(
        family: str, change: Callable[[Tensors], Tensors] = dict, name: str = "model", **metadata: str
    ) -> Path:
        path = compvis_layout.write(tiny_checkpoint(family), tmp_path / f"{name}.safetensors")
        tensors = {key: value.contiguous() for key, value in change(dict(load_file(path))).items()}
        save_file(tensors, path, metadata=metadata or None)
        return path

    return written


def assert_weights(found: Checkpoint, folder: Path, *subfolders: str) -> None:
    for subfolder in subfolders or tuple(found.models):
        ours = build(found, subfolder).state_dict()
        theirs = build(open_checkpoint(str(folder)), subfolder).state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), f"{subfolder}: {name}"


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("sdxl", "StableDiffusionXLPipeline"),
        ("sdxl-inpainting", "StableDiffusionXLInpaintPipeline"),
        ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl-small", "StableDiffusionXLPipeline"),
    ],
)
def test_weights_are_those_that_diffusers_reads(
    family: str, pipeline: str, write: Write, tiny_checkpoint: Callable[[str], Path]
) -> None:
    import diffusers

    path = write(family)
    found = open_single_file(path)
    theirs = getattr(diffusers, pipeline).from_single_file(
        str(path), config=str(tiny_checkpoint(family)), local_files_only=True
    )
    for subfolder in found.models:
        ours, other = build(found, subfolder).state_dict(), getattr(theirs, subfolder).state_dict()
        assert ours.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(ours[name].float(), value.float()), f"{subfolder}: {name}"


def without(*prefixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(prefixes)}


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for old, new in pairs:
            tensors = {
                (new + name.removeprefix(old) if name.startswith(old) else name): value
                for name, value in tensors.items()
            }
        return tensors

    return change


def with_clip_names(tensors: Tensors) -> Tensors:
    """The second encoder under CLIP's names, as node editors keep it."""
    folder_names: Tensors = {}
    for name, value in tensors.items():
        if not name.startswith(SECOND):
            folder_names[name] = value
    part = {n.removeprefix(SECOND): v for n, v in tensors.items() if n.startswith(SECOND)}
    mapped = ldm_names.open_clip_2(part, {"num_hidden_layers": 99, "hidden_size": 40})
    return folder_names | {f"clip_g.transformer.{name}": value for name, value in mapped.items()}


def linear_projection(tensors: Tensors) -> Tensors:
    matrix = tensors.pop(f"{SECOND}text_projection")
    return tensors | {f"{SECOND}text_projection.weight": matrix.T}


def with_leftovers(tensors: Tensors) -> Tensors:
    return tensors | {
        "denoiser.sigmas": torch.ones(1000),
        "alphas_cumprod": torch.ones(1000),
        f"{SECOND}attn_mask": torch.zeros(77, 77),
        "loss.discriminator.weight": torch.ones(3),
    }


def averaged(tensors: Tensors) -> Tensors:
    """Training's averages alone, by names without dots."""
    return without("model_ema.")(
        {
            (
                "model_ema." + name.removeprefix("model.").replace(".", "\0") if name.startswith(UNET) else name
            ): value
            for name, value in without("model_ema.")(tensors).items()
        }
    ) | {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value
        for name, value in tensors.items()
        if name.startswith(UNET)
    }


DEFECTS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "no positions": without(f"{FIRST}text_model.embeddings.position_ids"),
    "leftovers": with_leftovers,
    "no outer module": renamed((f"{FIRST}text_model.", FIRST)),
    "node editor's names": lambda tensors: renamed((FIRST, "clip_l.transformer."))(with_clip_names(tensors)),
    "linear projection": linear_projection,
    "the VAE under another prefix": renamed((VAE, "vae.")),
    "averages alone": averaged,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_published_files_change_nothing(
    defect: str, write: Write, tiny_checkpoint: Callable[[str], Path]
) -> None:
    found = open_single_file(write("sdxl", DEFECTS[defect]))
    assert found.family == "sdxl"
    assert_weights(found, tiny_checkpoint("sdxl"))


def test_a_missing_vae_or_encoder_is_asked_for(write: Write, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("sdxl")
    path = write("sdxl", without(VAE))
    with pytest.raises(CheckpointError, match="has no vae: give one with --vae or --base"):
        open_checkpoint(str(path))
    assert_weights(open_checkpoint(str(path), ConvertOptions(vae=str(folder / "vae"))), folder)
    for prefix, missing in ((SECOND, "text_encoder_2"), (FIRST, "text_encoder")):
        path = write("sdxl", without(prefix))
        with pytest.raises(CheckpointError, match=f"has no {missing}: give what is missing with --base"):
            open_checkpoint(str(path), ConvertOptions(family="sdxl"))
        found = open_checkpoint(str(path), ConvertOptions(family="sdxl", base=str(folder)))
        assert_weights(found, folder)
        assert found.tokenizers["text_encoder_2"]["vocab.json"].parent.name == "tokenizer_2"


def bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix(UNET): value for name, value in tensors.items() if name.startswith(UNET)}


UNETS: Mapping[str, Callable[[Path, Tensors], Tensors]] = {
    "with its prefix": lambda _, tensors: without(VAE, "conditioner.", "cond_stage", "model_ema.")(tensors),
    "bare names": lambda _, tensors: bare(tensors),
    "diffusers' names": lambda folder, _: compvis_layout.read_weights(folder, "unet"),
    "diffusers' names with a prefix": lambda folder, _: compvis_layout.prefixed(
        "unet.", compvis_layout.read_weights(folder, "unet")
    ),
}


@pytest.mark.parametrize(
    ("family", "spelling"),
    [("sdxl", spelling) for spelling in UNETS]
    + [
        (family, "diffusers' names")
        for family in ("sdxl-refiner", "sdxl-small", "sdxl-lcm", "sd1-tiny", "sd1-inpainting")
    ],
)
def test_a_unet_alone_takes_the_rest_from_a_base(
    family: str, spelling: str, write: Write, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint(family)
    base = tiny_checkpoint("sdxl" if family.startswith("sdxl") else "sd1")
    path = write(family, lambda tensors: UNETS[spelling](folder, tensors))
    with pytest.raises(CheckpointError, match="--base"):
        open_checkpoint(str(path))
    asked = family if family == "sdxl-refiner" else None  # as its base has both encoders and its width is no one's
    found = open_checkpoint(str(path), ConvertOptions(family=asked, base=str(base)))
    assert_weights(found, folder, "unet")
    encoders = [name for name in found.models if name.startswith("text_encoder")]
    assert encoders == (["text_encoder_2"] if family == "sdxl-refiner" else [*ENCODERS[family[:3] == "sdx"]])
    assert_weights(found, base, "vae", *encoders)


ENCODERS = (("text_encoder",), ("text_encoder", "text_encoder_2"))


def test_a_base_of_another_kind_is_refused(write: Write, tiny_checkpoint: Callable[[str], Path]) -> None:
    path = write("sdxl", bare)
    with pytest.raises(CheckpointError, match="text_encoder"):
        open_checkpoint(str(path), ConvertOptions(family="sdxl", base=str(tiny_checkpoint("sd1"))))


def test_marks_of_v_prediction_and_zero_snr(write: Write) -> None:
    marked: Callable[[Tensors], Tensors] = lambda tensors: {  # noqa: E731
        **tensors,
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
    }
    scheduler = open_single_file(write("sdxl", marked)).schedulers["scheduler"]
    assert scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("sd_xl_turbo_1.0_fp16", {}, ("EulerAncestralDiscreteScheduler", "trailing")),
        ("juggernautXL_v9Rdphoto2Lightning", {}, ("EulerDiscreteScheduler", "trailing")),
        ("realvis_v5.1HyperVAE", {}, ("DDIMScheduler", "trailing")),
        ("model", {"modelspec.title": "SDXL LCM"}, ("LCMScheduler", "leading")),
        ("turbulence", {}, ("EulerDiscreteScheduler", "leading")),
    ],
)
def test_models_of_few_steps_are_known_by_name(
    name: str, metadata: dict[str, str], expected: tuple[str, str], write: Write
) -> None:
    found = open_single_file(write("sdxl", name=name, **metadata))
    scheduler = found.schedulers["scheduler"]
    assert (scheduler["_class_name"], scheduler["timestep_spacing"]) == expected
    assert any("few steps" in note for note in found.notes) == (name != "turbulence")


SGM = """
model:
  params:
    scale_factor: 0.13025
    denoiser_config:
      params: {{scaling_config: {{target: sgm.modules.diffusionmodules.denoiser_scaling.{scaling}}}}}
    network_config: {{params: {{model_channels: 32, channel_mult: [1, 2, 2], num_head_channels: 16}}}}
    conditioner_config:
      params:
        emb_models:
          - {{input_key: txt, params: {{layer: hidden, layer_idx: {layer}}}}}
          - {{input_key: txt, params: {{layer: penultimate, always_return_pooled: true}}}}
"""


@pytest.mark.parametrize(("layer", "kept"), [(1, 2), (-2, 2), (0, 1)])
def test_a_configuration_beside_it_of_sgms_form(layer: int, kept: int, write: Write) -> None:
    """Clip skip 2, which Pony's users ask for, is what SDXL takes anyway: the states before the last layer."""
    path = write("sdxl")
    path.with_suffix(".yaml").write_text(SGM.format(scaling="VScaling", layer=layer))
    path.with_suffix(".config.json").write_text(
        json.dumps({"text_encoder": {"num_attention_heads": 4}, "text_encoder_2": {"num_attention_heads": 5}})
    )
    found = open_single_file(path)
    assert found.models["unet"].config["attention_head_dim"] == [2, 4, 4]
    assert found.models["text_encoder"].config["num_hidden_layers"] == kept
    assert found.schedulers["scheduler"]["prediction_type"] == "v_prediction"
    assert bool(found.notes) == (kept == 1)


FULL_SIZE: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sdxl": (
        {"transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048},
        {"transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20]},
        "UNetMidBlock2DCrossAttn",
    ),
    "sdxl-refiner": (
        {
            "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "projection_class_embeddings_input_dim": 2560,
            "transformer_layers_per_block": 4,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        },
        {"transformer_layers_per_block": 4, "attention_head_dim": [6, 12, 24, 24]},
        "UNetMidBlock2DCrossAttn",
    ),
    "ssd-1b": (
        {
            "cross_attention_dim": 2048,
            "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        },
        {
            "transformer_layers_per_block": [1, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
        "UNetMidBlock2D",
    ),
    "vega": (
        {
            "cross_attention_dim": 2048,
            "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
            "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        },
        {"transformer_layers_per_block": [1, 1, 2]},
        "UNetMidBlock2D",
    ),
}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_the_published_sizes_need_no_help(model: str) -> None:
    """A full-size UNet without storage: its configuration follows from shapes and our data alone."""
    made_of, expected, mid = FULL_SIZE[model]
    plain = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    }
    heads = {"attention_head_dim": expected["attention_head_dim"]} if "attention_head_dim" in expected else {}
    network: Any = empty(Submodel("UNet2DConditionModel", {**plain, **made_of, **heads}, dict, ()), model)
    part = compvis_layout.unet_tensors(network.state_dict(), network.config)
    data = ldm_configs.family_data("sdxl-refiner" if model == "sdxl-refiner" else "sdxl")
    config = ldm_configs.config("unet", "unet", part, data, {})
    assert {key: config[key] for key in expected} == expected
    assert config["mid_block_type"] == mid
    check(Submodel("UNet2DConditionModel", config, dict, ()), ldm_names.unet(part, config), model)


def test_files_of_no_known_family(write: Write) -> None:
    six = f"{UNET}input_blocks.0.0.weight"
    path = write("sdxl", lambda tensors: {**tensors, six: torch.zeros(32, 6, 3, 3)})
    with pytest.raises(CheckpointError, match="6 input channels"):
        open_single_file(path)
    with pytest.raises(InputError, match="family 'sdxl-inpainting' does not fit this file: expected sdxl"):
        open_single_file(write("sdxl"), "sdxl-inpainting")


def in_float8(tensors: Tensors, dtype: torch.dtype, *, scale: bool) -> Tensors:
    """As node editors store a UNet: its matrices in 8 bits, with or without a scale for each."""
    stored: Tensors = {f"{UNET}scaled_fp8": torch.zeros(2, dtype=dtype)} if scale else {}
    for name, value in tensors.items():
        if not (name.startswith(UNET) and name.endswith(".weight") and value.ndim == 2):
            stored[name] = value
            continue
        factor = value.float().abs().max() / 200 if scale else torch.tensor(1.0)
        stored[name] = (value.float() / factor).to(dtype)
        if scale:
            stored[name.removesuffix("weight") + "scale_weight"] = factor
            stored[name.removesuffix("weight") + "scale_input"] = torch.ones(())
    return stored


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float8_e4m3fn, False),
        (torch.float8_e5m2, False),
        (torch.float8_e4m3fn, True),
        (torch.bfloat16, False),
    ],
)
def test_weights_in_8_bits_and_in_bfloat16(
    dtype: torch.dtype, scale: bool, write: Write, tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = write("sdxl", lambda tensors: in_float8(tensors, dtype, scale=scale))
    stored = load_file(path)
    found = open_single_file(path).models["unet"].tensors()
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ldm = f"{UNET}input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    factor = stored[f"{ldm}.scale_weight"].float() if scale else torch.tensor(1.0)
    expected = stored[f"{ldm}.weight"].float() * factor
    assert torch.equal(found[f"{key}.weight"].float(), expected.half().float() if scale else expected)
    original = compvis_layout.read_weights(tiny_checkpoint("sdxl"), "unet")
    assert found.keys() == original.keys()
    for name, value in original.items():
        spread = (found[name].float() - value.float()).abs().max() / value.float().abs().max()
        assert spread < (0.13 if dtype is torch.float8_e5m2 else 0.07), name


def test_a_scale_without_its_weight_is_refused(write: Write) -> None:
    path = write("sdxl", lambda tensors: {**tensors, f"{UNET}out.2.scale_weight": torch.ones(())})
    with pytest.raises(CheckpointError, match=r"parts that no covered family has: out\.2\.scale_weight"):
        open_single_file(path)


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_files_with_noise_levels_of_edm_are_refused(mark: str, write: Write) -> None:
    """As ordinary ones they would draw noise."""
    path = write("sdxl", lambda tensors: {**tensors, mark: torch.ones(4)})
    with pytest.raises(CheckpointError, match=rf"has {mark}, so its noise levels are EDM's"):
        open_single_file(path)
