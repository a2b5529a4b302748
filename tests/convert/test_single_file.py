"""Single files in CompVis layout give the same networks as the diffusers folders that they stand for."""

from __future__ import annotations

import inspect
import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compvis_layout
from diffusion_convert.checkpoint import (
    ldm_configs,
    ldm_family,
    ldm_names,
    ldm_shapes,
    tensor_file,
    torch_networks,
)
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.single_file import CLIP_VOCABULARY_SIZE, open_single_file
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES
from shared_data import CLIP_TOKENIZER, needs_clip_tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("opening a file must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def write(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """``write("sd1")``: that tiny checkpoint as one file."""

    def written(family: str, suffix: str = ".safetensors", **beside_state_dict: Any) -> Path:
        return compvis_layout.write(tiny_checkpoint(family), tmp_path / f"model{suffix}", **beside_state_dict)

    return written


def change(path: Path, **beside: Mapping[str, Any]) -> None:
    """Merge into the file's ``STEM.config.json``."""
    beside_path = path.with_suffix(".config.json")
    beside_path.write_text(json.dumps(ldm_configs.merge(json.loads(beside_path.read_text()), beside)))


def edit(path: Path, **tensors: torch.Tensor | None) -> Path:
    """Rewrite a .safetensors file with ``tensors`` put in, or left out where None. ``__`` stands for a dot."""
    changed: dict[str, torch.Tensor | None] = {**load_file(path)}
    changed |= {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in changed.items() if value is not None}, path)
    return path


def empty(class_name: str, config: Mapping[str, Any]) -> Any:
    return torch_networks.empty(Submodel(class_name, config, dict, ()), class_name)


def check(class_name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    torch_networks.check(Submodel(class_name, config, dict, ()), tensors, class_name)


def effective(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the library's defaults filled in, without what says nothing about the network."""
    made = empty(class_name, config).config
    filled = made.to_dict() if hasattr(made, "to_dict") else dict(made)
    silent = {"architectures", "dropout", "dtype", "projection_dim", "sample_size", "transformers_version"}
    return {key: value for key, value in filled.items() if key not in silent and not key.startswith("_")}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' class makes of a scheduler's configuration."""
    import diffusers

    made = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    known = inspect.signature(type(made).__init__).parameters
    return {"_class_name": config["_class_name"], **{key: made.config[key] for key in known if key in made.config}}


def assert_same(checkpoint: Checkpoint, folder: Path) -> None:
    """Every weight and every configuration key that matters is that of the diffusers folder."""
    stored = {path.parent.name for path in folder.glob("*/config.json")} - {"safety_checker"}
    assert set(checkpoint.models) == stored
    for subfolder, model in checkpoint.models.items():
        expected, found = compvis_layout.read_weights(folder, subfolder), model.tensors()
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), f"{subfolder}: {name}"
        config = compvis_layout.read_config(folder, subfolder)
        assert effective(model.class_name, model.config) == effective(model.class_name, config)
    for name, scheduler in checkpoint.schedulers.items():
        expected_config = json.loads((folder / name / "scheduler_config.json").read_text())
        assert with_defaults(scheduler) == with_defaults(expected_config), name
    assert {path.parent.name for path in folder.glob("*/scheduler_config.json")} == set(checkpoint.schedulers)
    index = json.loads((folder / "model_index.json").read_text())
    for key in ("max_noise_level", "force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        assert checkpoint.pipeline_config.get(key) == index.get(key)
    tokenizers = [place for place in (folder / "tokenizer", folder / "tokenizer_2") if place.is_dir()]
    for place, files in zip(tokenizers, checkpoint.clip_tokenizers, strict=True):
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
            assert files[name].read_bytes() == (place / name).read_bytes()


UNETS = sorted(name for name, family in FAMILIES.items() if family.denoiser.component == "unet")
VARIATIONS = {"sd1-lcm": "sd1", "sd1-small": "sd1", "sd1-tiny": "sd1", "sdxl-lcm": "sdxl", "sdxl-small": "sdxl"}


@pytest.mark.parametrize(
    ("family", "suffix"),
    [*((family, suffix) for family in UNETS for suffix in (".safetensors", ".ckpt"))]
    + [(family, ".safetensors") for family in VARIATIONS],
)
def test_round_trip(
    family: str, suffix: str, write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = write(family, suffix)
    asked = family if family == "sd2-base" else None  # as wide as sd2-v: the one thing that weights do not say
    checkpoint = open_single_file(path, asked)
    assert checkpoint.family == VARIATIONS.get(family, family)
    assert checkpoint.name == "model"
    assert checkpoint.source.name == path.name
    assert_same(checkpoint, tiny_checkpoint(family))


class Callback:
    """Stands for what a training framework leaves in a .ckpt."""

    def __init__(self) -> None:
        self.best = torch.tensor(0.1)


def test_a_ckpt_with_training_callbacks(write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]) -> None:
    path = write("sd2-base", ".ckpt", callbacks={Callback: Callback()}, global_step=875_000, hyper=[Callback()])
    checkpoint = open_single_file(path)
    assert (checkpoint.family, checkpoint.notes) == ("sd2-base", ())
    assert_same(checkpoint, tiny_checkpoint("sd2-base"))


def test_what_was_assumed_is_said(write: Callable[..., Path]) -> None:
    checkpoint = open_single_file(write("sd2-v"))
    assert checkpoint.family == "sd2-v"
    (note,) = checkpoint.notes
    assert "judged by its weights to be sd2-v; --family sd2-base" in note
    assert open_single_file(write("sd2-v"), "sd2-v").notes == ()


@pytest.mark.parametrize(("spread", "expected"), [(0.3, True), (0.03, False)])
def test_a_wide_bias_tells_that_v_is_predicted(spread: float, expected: bool) -> None:
    bias = spread * torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert ldm_family.predicts_v({ldm_family.TELLING_BIAS: bias.half()}) == expected


@pytest.mark.parametrize(
    ("family", "mark", "expected"),
    [
        ("sd2-base", {"v_pred": torch.zeros(1)}, ("sd2-v", "v_prediction")),
        ("sd1", {"v_pred": torch.zeros(1)}, ("sd1", "v_prediction")),
        ("sd2-v", {"modelspec.prediction_type": "epsilon"}, ("sd2-base", "epsilon")),
        ("sd2-base", {"modelspec.prediction_type": "v"}, ("sd2-v", "v_prediction")),
    ],
)
def test_what_a_file_says_of_its_prediction(
    family: str, mark: dict[str, Any], expected: tuple[str, str], write: Callable[..., Path]
) -> None:
    path = write(family)
    tensors = load_file(path)
    texts = {name: value for name, value in mark.items() if isinstance(value, str)}
    save_file(tensors | {n: v for n, v in mark.items() if n not in texts}, path, metadata=texts)
    checkpoint = open_single_file(path)
    assert (checkpoint.family, checkpoint.schedulers["scheduler"]["prediction_type"]) == expected
    assert checkpoint.notes == ()


def test_what_files_are_is_seen_in_them(write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]) -> None:
    """Names mislead: a .safetensors file called .ckpt; and a text encoder that has the rest of its CLIP with it."""
    path = edit(write("sd1"), cond_stage_model__transformer__text_projection__weight=torch.ones(32, 32))
    renamed = path.rename(path.with_suffix(".ckpt"))
    found = torch_networks.build(open_single_file(renamed), "text_encoder").state_dict()
    expected = compvis_layout.read_weights(tiny_checkpoint("sd1"), "text_encoder")
    assert len(found) == len(expected)


@pytest.mark.parametrize("begin", [b"\x80", b"PK", b"\x00"])
def test_the_length_of_a_header_may_look_like_another_format(begin: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    wanted, texts = int.from_bytes(begin, "little"), {"pad": ""}
    for _ in range(3):
        save_file({"x": torch.ones(2)}, path, metadata=texts)
        length = int.from_bytes(path.read_bytes()[:8], "little")
        texts["pad"] += " " * ((wanted - length) % 256 ** len(begin))
    assert path.read_bytes().startswith(begin)
    assert torch.equal(tensor_file.read(path).tensors["x"], torch.ones(2))


def test_a_file_without_a_vae(write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]) -> None:
    path = write("sd1")
    save_file({n: v for n, v in load_file(path).items() if not n.startswith("first_stage_model.")}, path)
    with pytest.raises(CheckpointError, match="has no vae: give one with --vae or --base"):
        open_checkpoint(str(path))
    found = open_checkpoint(str(path), ConvertOptions(vae=str(tiny_checkpoint("sd1") / "vae")))
    assert_same(found, tiny_checkpoint("sd1"))
    with pytest.raises(InputError, match="pixels per latent 4, expected 8"):
        open_checkpoint(str(path), ConvertOptions(vae=str(tiny_checkpoint("x4-upscaler"))))


@pytest.mark.parametrize(("parameterization", "family"), [("v", "sd2-v"), ("eps", "sd2-base")])
def test_the_ldm_configuration_beside_it_decides(
    write: Callable[..., Path], parameterization: str, family: str
) -> None:
    path = write("sd2-v")
    path.with_suffix(".config.json").write_text('{"text_encoder": {"num_attention_heads": 4}}')
    path.with_suffix(".yaml").write_text(
        f"""
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "{parameterization}"
    linear_start: 0.00085
    linear_end: 0.0123
    scale_factor: 0.2
    unet_config:
      params: {{model_channels: 32, channel_mult: [1, 2], num_head_channels: 16}}
"""
    )
    checkpoint = open_single_file(path)
    assert (checkpoint.family, checkpoint.notes) == (family, ())
    assert checkpoint.models["unet"].config["attention_head_dim"] == [2, 4]
    assert checkpoint.models["vae"].config["scaling_factor"] == 0.2
    assert checkpoint.schedulers["scheduler"]["beta_end"] == 0.0123


@pytest.mark.parametrize("text", ["[1, 2", "model: 3", "model: {params: {unet_config: {}}}"])
def test_a_configuration_beside_it_that_is_none(write: Callable[..., Path], text: str) -> None:
    path = write("sd1")
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.yaml: not an LDM configuration"):
        open_single_file(path)
    path.with_suffix(".yaml").unlink()
    path.with_suffix(".config.json").write_text('{"unet": 1}')
    with pytest.raises(CheckpointError, match=r"model\.config\.json: expected diffusers' keys"):
        open_single_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_are_views_of_the_file(write: Callable[..., Path], suffix: str) -> None:
    """Also OpenCLIP's joint projection, which diffusers' mapping copies."""
    tensors = open_single_file(write("sd2-v", suffix)).models["text_encoder"].tensors()
    layer = "text_model.encoder.layers.0.self_attn"
    storages = {tensors[f"{layer}.{part}.weight"].untyped_storage().data_ptr() for part in ("q_proj", "v_proj")}
    assert len(storages) == 1


def test_a_text_encoder_without_its_outer_module(
    write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = write("sd1")
    tensors = {name.replace(".text_model.", "."): value for name, value in load_file(path).items()}
    save_file(tensors, path)
    assert_same(open_single_file(path), tiny_checkpoint("sd1"))


FULL_SIZE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": (
        {"cross_attention_dim": 768},
        {"attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2},
    ),
    "sd2-v": (
        {"cross_attention_dim": 1024, "use_linear_projection": True},
        {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "upcast_attention": True},
    ),
    "x4-upscaler": (
        {
            "block_out_channels": [256, 512, 512, 1024],
            "cross_attention_dim": 1024,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
            "in_channels": 7,
            "num_class_embeds": 1000,
            "only_cross_attention": [True, True, True, False],
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "use_linear_projection": True,
        },
        {
            "attention_head_dim": 8,
            "in_channels": 7,
            "layers_per_block": 2,
            "num_class_embeds": 1000,
            "only_cross_attention": [True, True, True, False],
        },
    ),
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_the_published_sizes_need_no_help(family: str) -> None:
    """A full-size UNet without storage: its configuration follows from shapes and our data alone."""
    made_of, expected = FULL_SIZE[family]
    network = empty("UNet2DConditionModel", made_of)
    part = compvis_layout.unet_tensors(network.state_dict(), network.config)
    config = ldm_configs.config("unet", "unet", part, ldm_configs.family_data(family), {})
    assert {key: config[key] for key in expected} == expected
    check("UNet2DConditionModel", config, ldm_names.unet(part, config))


@pytest.mark.parametrize(
    ("kind", "width", "blocks", "expected"),
    [("clip", 768, 12, (12, 12)), ("open_clip", 1024, 24, (16, 23)), ("open_clip", 1024, 23, (16, 23))],
)
def test_the_published_text_encoders(kind: str, width: int, blocks: int, expected: tuple[int, int]) -> None:
    made_of = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": 4 * width}
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in empty("CLIPTextModel", made_of).state_dict().items()
    }
    if kind == "open_clip":
        tensors = compvis_layout.open_clip_tensors(tensors, unused_block=True)
        tensors = {name: value for name, value in tensors.items() if f"resblocks.{blocks}." not in name}
    family = "sd1" if kind == "clip" else "sd2-v"
    config = ldm_configs.config(kind, "text_encoder", tensors, ldm_configs.family_data(family), {})
    assert (config["num_attention_heads"], config["num_hidden_layers"]) == expected
    check("CLIPTextModel", config, ldm_names.NAMES[kind](tensors, config))


def test_an_unusual_width_asks_for_the_heads(write: Callable[..., Path]) -> None:
    path = write("sd2-v")
    path.with_suffix(".config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no multiple of 64.*STEM\.config\.json"):
        open_single_file(path)


def test_clips_own_vocabulary(write: Callable[..., Path]) -> None:
    path = write("sd2-v")
    for file in (path.parent / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"tokens.*vocab\.json and merges\.txt"):
        open_single_file(path)
    edit(path, cond_stage_model__model__token_embedding__weight=torch.zeros(CLIP_VOCABULARY_SIZE, 32))
    files = open_single_file(path).tokenizers["text_encoder"]
    from transformers import CLIPTokenizer

    vocabulary = json.loads(files["vocab.json"].read_text(encoding="utf-8"))
    merges = files["merges.txt"].read_text(encoding="utf-8").splitlines()[1:]
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(vocabulary, key=vocabulary.__getitem__)[:512]
    assert [letter + "</w>" for letter in letters[:256]] == letters[256:]
    assert list(vocabulary) == [*letters, *(merge.replace(" ", "") for merge in merges), *special]
    assert list(vocabulary.values()) == list(range(CLIP_VOCABULARY_SIZE))
    tokenizer = CLIPTokenizer(str(files["vocab.json"]), str(files["merges.txt"]))
    words = tokenizer("a photograph of an astronaut riding a horse").input_ids
    assert words == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert '"pad_token": "!"' in files["tokenizer_config.json"].read_text()


@needs_clip_tokenizer
def test_clips_own_vocabulary_is_that_of_the_published_checkpoints() -> None:
    ours = ldm_configs.FOLDER / "clip"
    for name in ("vocab.json", "merges.txt"):
        first, second = ((folder / name).read_text(encoding="utf-8") for folder in (ours, CLIP_TOKENIZER))
        if name == "vocab.json":
            assert json.loads(first) == json.loads(second)
        else:
            assert first.splitlines()[1:] == second.splitlines()[1:]


def test_a_family_that_contradicts_the_file(write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"family 'sd1' does not fit.*expected sd2-base or sd2-v"):
        open_single_file(write("sd2-v"), "sd1")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("conditioner.embedders.9.x", "model.diffusion_model.x"), "has no vae and no text encoder"),
        (("lora_unet_x.lora_up.weight",), "--lora"),
        (("unet.x.lora_A.weight",), "--lora"),
        (("control_model.x",), "ControlNet"),
        (("down_blocks.0.x",), "has no unet and no vae and no text encoder"),
        (("model.diffusion_model.double_blocks.0.x",), "Flux"),
        (("encoder.down.0.x",), "--vae"),
        (("something",), "has no unet and no vae and no text encoder: expected a checkpoint in CompVis layout"),
        (("model.diffusion_model.x", "first_stage_model.x"), "has no text encoder"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_single_file(tmp_path / "model.safetensors")


UNET, VAE = "model__diffusion_model__", "first_stage_model__"
DAMAGES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "a missing weight": (
        {f"{UNET}middle_block__1__norm__weight": None},
        "unet: .*missing: mid_block.attentions.0.norm.weight",
    ),
    "a missing first weight": ({f"{UNET}input_blocks__0__0__weight": None}, "0 input channels"),
    "a missing block": ({f"{UNET}input_blocks__1__0__in_layers__2__weight": None}, "is missing"),
    "another shape": ({f"{UNET}out__2__bias": torch.zeros(5)}, "unet: .*wrong shapes: conv_out.bias"),
    "another vae": (
        {f"{VAE}decoder__conv_out__bias": torch.zeros(5)},
        "vae: .*wrong shapes: decoder.conv_out.bias",
    ),
    "unCLIP": (
        {f"{UNET}label_emb__0__0__weight": torch.zeros(5, 5)},
        "parts that no covered family has: label_emb",
    ),
    "video": (
        {f"{UNET}input_blocks__1__1__time_stack__0__x": torch.zeros(5)},
        "unknown: down_blocks.0.attentions.0.time_stack",
    ),
    "other channels": ({f"{UNET}input_blocks__0__0__weight": torch.zeros(32, 6, 3, 3)}, "6 input channels"),
    "no matrix": (
        {f"{UNET}input_blocks__1__0__in_layers__2__weight": torch.zeros(())},
        "has shape \\(\\), not 4 dimensions",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_before_work_starts(write: Callable[..., Path], damage: str) -> None:
    tensors, message = DAMAGES[damage]
    path = edit(write("sd1"), **tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_single_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_depth_checkpoint_without_its_estimator(write: Callable[..., Path]) -> None:
    path = write("sd2-depth")
    tensors = load_file(path)
    edit(path, **{name.replace(".", "__"): None for name in tensors if name.startswith("depth_model.")})
    with pytest.raises(CheckpointError, match="depth estimator"):
        open_single_file(path)


def test_a_file_that_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match=r"damaged, or no file of tensors: .*\.ckpt"):
        open_single_file(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        open_single_file(tmp_path / "absent.safetensors")


def test_every_kind_of_network_has_sizes_and_names() -> None:
    assert ldm_shapes.SIZES.keys() == ldm_names.NAMES.keys()
