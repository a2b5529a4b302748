"""Folders in diffusers' layout: which files are taken, and what is said of folders that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.diffusers_folder import weight_files
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import CheckpointError

UNET = "unet/diffusion_pytorch_model.safetensors"


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(checkpoint.models["unet"].tensors())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors", "pytorch_model.fp16.bin"], "model.safetensors"),
        (["pytorch_model.bin", "pytorch_model.fp16.bin"], "pytorch_model.fp16.bin"),
        (
            ["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.bin"],
            "diffusion_pytorch_model.bin",
        ),
    ],
)
def test_the_best_file_is_taken(names: list[str], expected: str) -> None:
    assert weight_files(names, lambda _: {}) == (expected,)


def test_shards_are_read_together(folder: Path) -> None:
    whole = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(whole)
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: shards[index % 2] for index, name in enumerate(names)}
    for file in shards:
        save_file({name: whole[name] for name in names if places[name] == file}, folder / "unet" / file)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = tensors(open_checkpoint(str(folder)))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in names)
    (folder / "unet" / places[names[0]]).unlink()
    with pytest.raises(CheckpointError, match=r"weights are missing: .*-00001-of-00002"):
        open_checkpoint(str(folder))


def test_pickled_weights_are_read_where_there_are_no_others(folder: Path) -> None:
    whole = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(whole, folder / "unet" / "diffusion_pytorch_model.bin")
    found = tensors(open_checkpoint(str(folder)))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_attention_of_old_vaes_is_renamed(folder: Path) -> None:
    """diffusers before 0.12 wrote query, key, value and proj_attn."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = load_file(path)
    expected = {name: value.clone() for name, value in renamed.items()}
    for new, name in old.items():
        renamed = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for key, v in renamed.items()}
    assert renamed.keys() != expected.keys()
    save_file(renamed, path)
    network = torch_networks.build(open_checkpoint(str(folder)), "vae")
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_license_is_the_model_cards(folder: Path) -> None:
    assert open_checkpoint(str(folder)).source.license is None
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: []\n---\n# Model\n")
    assert open_checkpoint(str(folder)).source.license == "creativeml-openrail-m"


def test_parts_that_are_optional_may_lack(folder: Path) -> None:
    shutil.rmtree(folder / "safety_checker")
    checkpoint = open_checkpoint(str(folder))
    assert "safety_checker" not in checkpoint.models
    assert checkpoint.notes == (
        "model_index.json names a safety_checker, but there is no such folder: made without it",
    )


def test_what_training_left_beside_the_weights_is_left_out(folder: Path) -> None:
    """Averages in a UNet's file; a whole CLIP, and its class, where a text encoder should be. A stranger within the
    network is an error (`DAMAGES`)."""
    weights = load_file(folder / UNET)
    save_file({**weights, **{f"ema.{name}": value + 1 for name, value in weights.items()}}, folder / UNET)
    text = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(text), "vision_model.x": torch.ones(2), "text_projection.weight": torch.ones(2)}, text)
    checkpoint = open_checkpoint(str(folder))
    make_plan(checkpoint, ConvertOptions())
    built = torch_networks.build(checkpoint, "unet").state_dict()
    assert all(torch.equal(built[name], weights[name]) for name in weights)


def test_a_text_encoder_that_projects_is_one(folder: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    index, text = folder / "model_index.json", folder / "text_encoder" / "model.safetensors"
    index.write_text(index.read_text().replace('"CLIPTextModel"', '"CLIPTextModelWithProjection"'))
    save_file({**load_file(text), "text_projection.weight": torch.randn(32, 32)}, text)
    shape, ids = Shape(64, 64, 2), torch.arange(77)[None]
    plain, projecting = (
        table()["text_encoder"].build(open_checkpoint(str(place)), None, shape).module.float()(ids)
        for place in (tiny_checkpoint("sd1"), folder)
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, projecting, strict=True))


def _truncate(folder: Path) -> None:
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: len(data) // 2])


def _leave_the_folder(folder: Path) -> None:
    (folder / UNET).rename(folder / "elsewhere.safetensors")
    index = {"weight_map": {"conv_in.bias": "../elsewhere.safetensors"}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))


def _drop_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").unlink()


def _add_layer(folder: Path) -> None:
    weights = load_file(folder / UNET)
    save_file({**weights, "class_embedding.weight": torch.ones(2), "loss.x": torch.ones(1)}, folder / UNET)


def _garble(folder: Path) -> None:
    (folder / UNET).write_bytes(b"<html>404</html>" * 10)


def _rename_weight(folder: Path) -> None:
    weights = load_file(folder / UNET)
    save_file({name.replace("conv_in.bias", "conv_in.offset"): v for name, v in weights.items()}, folder / UNET)


def _reshape_weight(folder: Path) -> None:
    weights = load_file(folder / UNET)
    save_file({**weights, "conv_in.bias": torch.zeros(7)}, folder / UNET)


def _change_config(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "down_block_types": ["Nonsense"]}))


def _in_shards(folder: Path) -> tuple[Path, Path]:
    """The UNet's weights in two files with an index, as diffusers saves large ones."""
    whole = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(whole)
    halves = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: whole[name] for name in part}, folder / "unet" / file)
    places = {name: file for file, part in halves.items() for name in part}
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "unet" / "1.safetensors", folder / "unet" / "2.safetensors"


def _truncate_shard(folder: Path) -> None:
    shard = _in_shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose_from_shard(folder: Path) -> None:
    for shard in _in_shards(folder):
        save_file({name: value for name, value in load_file(shard).items() if name != "conv_in.bias"}, shard)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
    "index is no JSON": (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read as JSON"),
    "no folder of the UNet": (lambda folder: shutil.rmtree(folder / "unet"), "lacks unet"),
    "no weights": (lambda folder: (folder / UNET).unlink(), "weights are missing"),
    "no scheduler": (lambda folder: (folder / "scheduler/scheduler_config.json").unlink(), "missing"),
    "truncated": (_truncate, "damaged"),
    "not safetensors": (_garble, "damaged"),
    "wrong names": (_rename_weight, r"missing: conv_in.bias; unknown: conv_in.offset"),
    "wrong shape": (_reshape_weight, r"conv_in.bias \(7,\), expected \(32,\)"),
    "unknown block": (_change_config, "does not describe"),
    "more layers": (_add_layer, "unknown: class_embedding.weight$"),
    "shards outside": (_leave_the_folder, "names a file '../elsewhere.safetensors' outside of its folder"),
    "a shard that is missing": (
        lambda folder: _in_shards(folder)[0].unlink(),
        r"weights are missing: 1\.safetensors",
    ),
    "a truncated shard": (_truncate_shard, r"2\.safetensors: damaged"),
    "no shard has what the index names": (_lose_from_shard, r"missing: conv_in\.bias$"),
    "index of nothing": (
        lambda folder: (folder / UNET).rename(folder / f"{UNET}.index.json").write_text("{}"),
        "expected a weight_map",
    ),
    "no vocabulary": (_drop_vocabulary, "the tokenizer has neither vocab.json and merges.txt nor tokenizer.json"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), r"lacks tokenizer \(it has"),
    "a note of Git LFS": (
        lambda folder: (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\nsize 3438167540\n"),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_before_work_starts(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        make_plan(open_checkpoint(str(folder)), ConvertOptions())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nope", "nope", "nope.safetensors"])
def test_no_such_place(source: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(source)
