"""Folders in diffusers' layout as people have them, against diffusers' and transformers' own loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from diffusion_convert import ConvertOptions
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.plan import make_plan
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
