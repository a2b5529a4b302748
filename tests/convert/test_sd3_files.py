"""Stable Diffusion 3 in one file: the same networks as from diffusers' folder, and what a file may lack."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

import tiny_sd3
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.ldm_mmdit import mmdit
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.vocabulary import check_t5
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import CheckpointError, InputError, InstallationError

Write = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="module")
def folders(build_once: Write) -> Callable[[str], Path]:
    return lambda kind: build_once(f"checkpoint-{kind}", lambda to: tiny_sd3.build(kind, to / kind)) / kind


def same(found: Checkpoint, expected: Checkpoint, *but: str) -> None:
    """Every network, with its configuration as its class reads it, and every weight."""
    assert found.models.keys() == expected.models.keys() - set(but)
    for name in found.models:
        ours, theirs = (torch_networks.build(one, name) for one in (found, expected))
        weights = theirs.state_dict()
        assert ours.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in ours.state_dict().items()), name
        keys = {"_name_or_path", "_diffusers_version", "transformers_version", "dtype", "architectures"}
        told, known = (
            {
                k: v
                for k, v in dict(vars(net.config) if not isinstance(net.config, dict) else net.config).items()
                if k not in keys
            }
            for net in (ours, theirs)
        )
        for key in ("num_attention_heads", "num_heads", "d_kv", "hidden_act", "dual_attention_layers", "qk_norm"):
            assert list_of(told.get(key)) == list_of(known.get(key)), (name, key)


def list_of(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("kind", ["sd3", "sd3.5"])
def test_a_file_gives_what_the_folder_gives(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = identity_projection(folders(kind), tmp_path / "folder")
    path = tiny_sd3.write_file(folder, tmp_path / "file" / f"{kind}.safetensors")
    found, expected = open_checkpoint(str(path)), open_checkpoint(str(folder))
    same(found, expected)
    assert (found.family, found.notes) == ("sd3", ())
    assert found.schedulers["scheduler"] == {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    }
    vae = found.models["vae"].config
    assert (vae["scaling_factor"], vae["shift_factor"], vae["use_quant_conv"]) == (1.5305, 0.0609, False)


def identity_projection(folder: Path, to: Path) -> Path:
    """CLIP ViT-L's projection as in the published folder: none, which diffusers puts in for a file's."""
    import shutil

    shutil.copytree(folder, to)
    path = to / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["text_projection.weight"] = torch.eye(len(weights["text_projection.weight"]), dtype=torch.float16)
    save_file(weights, path)
    return to


@pytest.mark.parametrize("kind", ["sd3", "sd3.5"])
def test_names_are_those_of_diffusers_own_mapping(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tiny_sd3.write_file(folders(kind), tmp_path / "model.safetensors", ())
    prefix = "model.diffusion_model."
    tensors = {n.removeprefix(prefix): v for n, v in load_file(path).items() if n.startswith(prefix)}
    config = json.loads((folders(kind) / "transformer" / "config.json").read_text(encoding="utf-8"))
    found = mmdit(tensors, config)
    expected = convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_file_without_text_encoders_takes_a_base(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_sd3.write_file(folders("sd3"), tmp_path / "sd3_medium.safetensors", ())
    with pytest.raises(CheckpointError, match=r"has no text_encoder and no text_encoder_2: give .* with --base"):
        open_checkpoint(str(path))
    base = open_checkpoint(str(folders("sd3")))
    found = open_checkpoint(str(path), ConvertOptions(base=str(folders("sd3"))))
    same(found, base)
    assert found.tokenizers["text_encoder_3"]
    same(open_checkpoint(str(path), ConvertOptions(base=str(folders("sd3")), no_t5=True)), base, "text_encoder_3")


def test_t5_is_left_out_without_its_tokenizer(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_sd3.write_file(folders("sd3"), tmp_path / "model.safetensors")
    (tmp_path / "tokenizer_3").rename(tmp_path / "elsewhere")
    found = open_checkpoint(str(path))
    assert "text_encoder_3" not in found.models
    assert found.notes == (
        "model.safetensors has T5 without its tokenizer: made without T5; a folder tokenizer_3 beside the file, or "
        "--base, gives it",
    )


def test_sentencepieces_own_file_is_read_by_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes it for another format where that is not there."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InstallationError, match=r"spiece\.model: run `pip install sentencepiece`.*tokenizer\.json"):
        check_t5({"spiece.model": Path("spiece.model")}, 100)


def test_other_families_and_unknown_parts_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_sd3.write_file(folders("sd3"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="family 'sdxl' does not fit a Stable Diffusion 3 model: expected sd3"):
        open_checkpoint(str(path), ConvertOptions(family="sdxl"))
    extra = {**load_file(path), "model.diffusion_model.joint_blocks.0.x_block.extra.weight": torch.zeros(2)}
    save_file(extra, path)
    with pytest.raises(CheckpointError, match=r"x_block\.extra: no part of Stable Diffusion 3's transformer"):
        open_checkpoint(str(path))
