"""Folders in diffusers' layout as people have them, against diffusers' and transformers' own loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.option_values import Lora
from diffusion_runtime.errors import CheckpointError, InputError
from folders import WEIGHTS, configure


def add_variant(folder: Path, part: str, variant: str, shift: float) -> None:
    """Weights of a variant beside the others, each moved by ``shift``."""
    stem, _, suffix = WEIGHTS[part].partition(".")
    weights = {name: value + shift for name, value in load_file(folder / part / WEIGHTS[part]).items()}
    save_file(weights, folder / part / f"{stem}.{variant}.{suffix}")


def diffusers_unet(folder: Path, variant: str | None) -> Any:
    from diffusers import UNet2DConditionModel

    with torch_networks.silent():
        return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", variant=variant)


def assert_unet(checkpoint: Checkpoint, expected: Any) -> None:
    built = torch_networks.build(checkpoint, "unet").state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(built[name].float(), value.float()), name


@pytest.mark.parametrize("variant", ["non_ema", "ema", "bf16", "fp16", "my_own"])
def test_a_variant_that_is_all_there_is_is_taken(variant: str, folder: Path) -> None:
    for part in WEIGHTS:
        add_variant(folder, part, variant, 0.5)
        (folder / part / WEIGHTS[part]).unlink()
    checkpoint = open_checkpoint(str(folder))
    make_plan(checkpoint, ConvertOptions())
    assert_unet(checkpoint, diffusers_unet(folder, variant))
    assert any(f"unet has weights of the variant {variant} only" in n for n in checkpoint.notes) == (
        variant != "fp16"
    )


@pytest.mark.parametrize("variant", ["non_ema", "ema", "bf16", "fp16"])
def test_a_variant_that_is_asked_for_is_taken(variant: str, folder: Path) -> None:
    """diffusers takes weights without a variant for the parts that lack it."""
    add_variant(folder, "unet", variant, 0.5)
    checkpoint = open_checkpoint(str(folder), ConvertOptions(variant=variant))
    assert_unet(checkpoint, diffusers_unet(folder, variant))
    assert checkpoint.notes == ()
    make_plan(checkpoint, ConvertOptions())


def test_variants_beside_the_weights_are_left_out(folder: Path) -> None:
    for variant in ("non_ema", "ema"):
        add_variant(folder, "unet", variant, 0.5)
    checkpoint = open_checkpoint(str(folder))
    assert_unet(checkpoint, diffusers_unet(folder, None))
    assert checkpoint.notes == ()


def test_several_variants_ask_which(folder: Path) -> None:
    for variant in ("non_ema", "ema"):
        add_variant(folder, "unet", variant, 0.5)
    (folder / "unet" / WEIGHTS["unet"]).unlink()
    with pytest.raises(CheckpointError, match=r"unet: weights of several variants.*: ema, non_ema; --variant"):
        open_checkpoint(str(folder))
    assert_unet(open_checkpoint(str(folder), ConvertOptions(variant="ema")), diffusers_unet(folder, "ema"))
    with pytest.raises(CheckpointError, match="several variants"):
        open_checkpoint(str(folder), ConvertOptions(variant="bf16"))


def test_a_variant_that_is_not_there(folder: Path) -> None:
    add_variant(folder, "unet", "ema", 0.5)
    with pytest.raises(InputError, match=r"--variant bf16: .* has no such weights; it has ema"):
        open_checkpoint(str(folder), ConvertOptions(variant="bf16"))


def test_shards_of_a_variant(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    network.save_pretrained(folder / "unet", variant="bf16", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*-of-*"))) > 1
    for variant in (None, "bf16"):
        assert_unet(open_checkpoint(str(folder), ConvertOptions(variant=variant)), diffusers_unet(folder, "bf16"))


@pytest.mark.parametrize("left", [1, 2])
def test_layers_that_the_configuration_leaves_out(left: int, folder: Path) -> None:
    """Clip skip made permanent: transformers ignores the rest of the weights."""
    from transformers import CLIPTextModel

    text = folder / "text_encoder" / WEIGHTS["text_encoder"]
    weights = load_file(text)
    more = {n.replace("layers.1.", "layers.2."): v + 1 for n, v in weights.items() if "layers.1." in n}
    save_file(weights | more, text)
    configure(folder, "text_encoder", num_hidden_layers=left)
    checkpoint = open_checkpoint(str(folder))
    notes = make_plan(checkpoint, ConvertOptions()).notes
    assert any(f"text_encoder: its configuration leaves out the last {3 - left}" in note for note in notes)
    with torch_networks.silent():
        expected = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32)
    ids = torch.arange(77)[None]
    with torch.inference_mode():
        found = torch_networks.build(checkpoint, "text_encoder").float()(ids).last_hidden_state
        torch.testing.assert_close(found, expected.eval()(ids).last_hidden_state)


def test_a_context_that_is_given_by_block(folder: Path) -> None:
    configure(folder, "unet", cross_attention_dim=[32, 32])
    checkpoint = open_checkpoint(str(folder))
    make_plan(checkpoint, ConvertOptions())
    assert_unet(checkpoint, diffusers_unet(folder, None))
    configure(folder, "unet", cross_attention_dim=[32, 64])
    with pytest.raises(CheckpointError, match=r"cross_attention_dim \[32, 64\]: .* several widths"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_hid_dim": 48}, "encoder_hid_dim"),
        ({"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
        ({"encoder_hid_dim": 48, "encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8}, "'projection'.*unCLIP"),
        (
            {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 8},
            "simple_projection",
        ),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity'"),
        ({"num_class_embeds": 10}, "class embeddings"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
    ],
)
def test_inputs_that_no_family_has_are_named(values: dict[str, Any], message: str, folder: Path) -> None:
    configure(folder, "unet", **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [("controlnet", "a ControlNet"), ("image_encoder", "an image encoder"), ("adapter", "a T2I-Adapter")],
)
def test_parts_of_other_pipelines_are_said_to_be_left_out(name: str, what: str, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionControlNetPipeline", name: ["diffusers", "SomeModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / name).mkdir()
    assert any(what in note and "made without it" in note for note in open_checkpoint(str(folder)).notes)
    assert any(what in note for note in make_plan(open_checkpoint(str(folder)), ConvertOptions()).notes)


@pytest.mark.parametrize("channels", [3, 8, 16])
def test_a_vae_of_other_latents_than_the_unets(channels: int, folder: Path) -> None:
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_config({**tiny_checkpoints.VAE, "latent_channels": channels})
    save_file(network.state_dict(), folder / "vae" / WEIGHTS["vae"])
    configure(folder, "vae", latent_channels=channels)
    with pytest.raises(CheckpointError, match=f"VAE has latents of {channels} channels, but the UNet takes 4"):
        open_checkpoint(str(folder))


def test_a_text_encoder_of_another_width(folder: Path, tmp_path: Path) -> None:
    other = tiny_checkpoints.build("sd1-odd", tmp_path / "other")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(other / "text_encoder", folder / "text_encoder")
    with pytest.raises(CheckpointError, match="text encoder gives states of 40 channels, but the UNet takes 32"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("source", ["unet", "bare", "averaged"])
def test_a_unet_alone_takes_the_rest_from_its_base(source: str, folder: Path, tmp_path: Path) -> None:
    import compvis_layout

    other = tiny_checkpoints.build("sd1", tmp_path / "other", seed=3)
    path = compvis_layout.write(other, tmp_path / "single" / "model.safetensors")
    prefix = "model.diffusion_model."
    unet = {n: v for n, v in load_file(path).items() if n.startswith(prefix)}
    changed = {
        "unet": unet,
        "bare": {n.removeprefix(prefix): v for n, v in unet.items()},
        "averaged": {"model_ema." + n.removeprefix("model.").replace(".", ""): v for n, v in unet.items()},
    }
    save_file(changed[source], path)
    checkpoint = open_checkpoint(str(path), ConvertOptions(base=str(folder)))
    assert_unet(checkpoint, diffusers_unet(other, None))
    base = open_checkpoint(str(folder))
    assert checkpoint.tokenizers == base.tokenizers
    for part in ("vae", "text_encoder", "safety_checker"):
        built, expected = (torch_networks.build(one, part).state_dict() for one in (checkpoint, base))
        assert all(torch.equal(built[name], value) for name, value in expected.items())
    assert checkpoint.schedulers == base.schedulers
    make_plan(checkpoint, ConvertOptions())
    with pytest.raises(InputError, match=r"--base .*is no single file"):
        open_checkpoint(str(folder), ConvertOptions(base=str(folder)))
    with pytest.raises(CheckpointError, match=r"--base .*no such file"):
        open_checkpoint(str(path), ConvertOptions(base=str(tmp_path / "nowhere")))


NO_COUNTS: tuple[Any, ...] = ("32", [1], {}, None, 0, -4)
WRONG: list[tuple[str, str, Any]] = [
    *(("text_encoder", "hidden_size", value) for value in NO_COUNTS),
    *(("text_encoder", "vocab_size", value) for value in NO_COUNTS),
    ("text_encoder", "num_hidden_layers", 1_000_000),
    ("text_encoder", "num_hidden_layers", "2"),
    ("text_encoder", "num_attention_heads", 0),
    ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "max_position_embeddings", -1),
    ("text_encoder", "max_position_embeddings", 10**9),
    ("text_encoder", "hidden_act", 3),
    ("text_encoder", "hidden_act", "nonsense"),
    ("text_encoder", "layer_norm_eps", "x"),
    ("text_encoder", "eos_token_id", "x"),
    ("safety_checker", "vision_config", "x"),
    ("safety_checker", "vision_config", [1]),
    ("safety_checker", "vision_config", {"hidden_size": "32"}),
    ("safety_checker", "vision_config", {"image_size": None}),
    ("safety_checker", "vision_config", {"patch_size": 0}),
    ("safety_checker", "vision_config", {"num_hidden_layers": 10**6}),
    ("safety_checker", "text_config", 7),
    ("safety_checker", "projection_dim", "x"),
    ("unet", "norm_num_groups", 0),
    ("unet", "norm_num_groups", 7),
    ("unet", "downsample_padding", {}),
    ("unet", "downsample_padding", -1),
    ("unet", "layers_per_block", 1_000_000),
    ("unet", "layers_per_block", [1_000_000, 1]),
    ("unet", "layers_per_block", "x"),
    ("unet", "transformer_layers_per_block", 10**6),
    ("unet", "transformer_layers_per_block", [[10**6], 1]),
    ("unet", "in_channels", "4"),
    ("unet", "in_channels", 10**9),
    ("unet", "out_channels", None),
    ("unet", "block_out_channels", []),
    ("unet", "block_out_channels", [32, "x"]),
    ("unet", "block_out_channels", 32),
    ("unet", "attention_head_dim", 0),
    ("unet", "sample_size", "x"),
    ("unet", "sample_size", -3),
    ("unet", "act_fn", 1),
    ("unet", "class_embed_type", 1),
    ("unet", "down_block_types", [1, 2]),
    ("unet", "down_block_types", None),
    ("vae", "shift_factor", "x"),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", "x"),
    ("vae", "scaling_factor", float("inf")),
    ("vae", "latent_channels", 0),
    ("vae", "norm_num_groups", 0),
    ("vae", "layers_per_block", 1_000_000),
    ("vae", "block_out_channels", [32] * 1000),
    ("vae", "in_channels", "3"),
]


@pytest.mark.parametrize(("part", "key", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_configurations_of_wrong_types_and_sizes(part: str, key: str, value: Any, folder: Path) -> None:
    import time

    configure(folder, part, **{key: value})
    started = time.process_time()
    with pytest.raises((CheckpointError, InputError)) as caught:
        make_plan(open_checkpoint(str(folder)), ConvertOptions())
    assert time.process_time() - started < 10
    assert "\n" not in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "in_channels", "out_channels", "latent_channels"])
def test_keys_that_are_left_out_are_the_libraries_defaults(missing: str, folder: Path) -> None:
    """Here the default is the value, or another: then the weights do not fit, which is said."""
    part = {"hidden_size": "text_encoder", "vocab_size": "text_encoder", "latent_channels": "vae"}.get(
        missing, "unet"
    )
    configure(folder, part, **{missing: ...})
    if part == "text_encoder":
        with pytest.raises(CheckpointError, match=r"512 channels|wrong shapes: .*49408"):
            make_plan(open_checkpoint(str(folder)), ConvertOptions())
    else:
        make_plan(open_checkpoint(str(folder)), ConvertOptions())


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "models/\udbff.safetensors"])
@pytest.mark.parametrize("given", ["source", "vae", "base", "output", "lora"])
def test_texts_that_are_no_paths(given: str, text: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a NUL or half a surrogate pair") as caught:
        if given == "output":
            convert(str(folder), Path(text))
        elif given == "lora":
            convert(str(folder), tmp_path / "models", ConvertOptions(loras=(Lora(Path(text)),)))
        elif given == "source":
            open_checkpoint(text)
        else:
            ConvertOptions(**{given: text})  # type: ignore[arg-type]
    assert str(caught.value).isascii()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("every", [True, False])
def test_weights_without_values_are_refused_without_verification(
    value: float, every: bool, folder: Path, tmp_path: Path
) -> None:
    text = folder / "text_encoder" / WEIGHTS["text_encoder"]
    weights = load_file(text)
    changed = list(weights) if every else ["text_model.final_layer_norm.bias"]
    save_file({n: torch.full_like(v, value) if n in changed else v for n, v in weights.items()}, text)
    options = ConvertOptions(components=("text_encoder",), verify=False, compiled=False, zip=False)
    with pytest.raises(CheckpointError, match="infinite or undefined value"):
        convert(str(folder), tmp_path / "models", options)


def whole_clip(folder: Path, part: str) -> None:
    """config.json and weights of a whole CLIP in a text encoder's folder."""
    path = folder / part / "config.json"
    text = json.loads(path.read_text())
    vision = {"hidden_size": 8, "model_type": "clip_vision_model"}
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": text, "vision_config": vision}
    path.write_text(json.dumps({**whole, "projection_dim": text["projection_dim"], "hidden_size": 99}))
    more = {
        "vision_model.embeddings.class_embedding": torch.zeros(8),
        "visual_projection.weight": torch.zeros(8, 8),
    }
    file = folder / part / "model.safetensors"
    save_file({**load_file(file), **more, "logit_scale": torch.tensor(4.6)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("family", "part"), [("sd1", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_the_configuration_of_a_whole_clip(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, part: str
) -> None:
    import transformers

    source = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    whole_clip(source, part)
    checkpoint = open_checkpoint(str(source))
    make_plan(checkpoint, ConvertOptions(attention="original"))
    with torch_networks.silent(), torch.inference_mode():
        kind = getattr(transformers, checkpoint.models[part].class_name)
        expected = kind.from_pretrained(source / part, dtype=torch.float32).eval()
        ids = torch.randint(0, 300, (1, 77), generator=torch.Generator().manual_seed(0))
        ours = torch_networks.build(checkpoint, part).float()(ids)
        assert all(
            torch.allclose(one, two, atol=1e-5) for one, two in zip(ours[:2], expected(ids)[:2], strict=True)
        )


NOT_COVERED: list[tuple[str, str, dict[str, Any], str]] = [
    ("sd1", "text_encoder", {"use_attention_mask": True}, "use_attention_mask"),
    ("sdxl", "unet", {"addition_time_embed_dim": ...}, "addition_time_embed_dim"),
    ("sd1", "text_encoder", {"eos_token_id": [49407, 2]}, "eos_token_id"),
]


@pytest.mark.parametrize(("family", "part", "values", "named"), NOT_COVERED)
def test_configurations_that_diffusers_follows_and_nothing_here_does(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    part: str,
    values: dict[str, Any],
    named: str,
) -> None:
    source = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    configure(source, part, **values)
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(str(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "part", "values"),
    [
        ("sd1", "vae", {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}),  # not by SD 1's pipelines
        ("sdxl", "vae", {"latents_mean": None, "latents_std": None}),
        ("sdxl", "text_encoder", {"use_attention_mask": True}),  # not by SDXL's
        ("sd1", "text_encoder", {"use_attention_mask": False}),
    ],
)
def test_configurations_that_no_pipeline_follows(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, part: str, values: dict[str, Any]
) -> None:
    source = shutil.copytree(tiny_checkpoint(family), tmp_path / "checkpoint")
    configure(source, part, **values)
    assert open_checkpoint(str(source)).family == family
