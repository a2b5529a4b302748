"""Another VAE replaces encoder and decoder alike, and brings its scale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compvis_layout
import tiny_checkpoints
from diffusion_convert.checkpoint import ldm_configs, repository
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.single_file import open_single_file
from diffusion_convert.checkpoint.vae import with_vae
from diffusion_runtime.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    return open_single_file(compvis_layout.write(tiny_checkpoint("sd1"), path))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose VAE has other weights, another scale and a shift."""
    folder = tiny_checkpoints.build("sd1", tmp_path_factory.mktemp("other"), seed=7)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.5, "shift_factor": 0.1}))
    return folder


def assert_replaced(found: Checkpoint, checkpoint: Checkpoint, other: Path) -> None:
    expected, tensors = compvis_layout.read_weights(other, "vae"), found.models["vae"].tensors()
    before = checkpoint.models["vae"].tensors()
    assert set(tensors) == set(expected) == set(before)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    for half in ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"):
        assert not torch.equal(tensors[half], before[half])
    assert {name: model for name, model in found.models.items() if name != "vae"} == {
        name: model for name, model in checkpoint.models.items() if name != "vae"
    }


@pytest.mark.parametrize("inner", ["", "vae"])
def test_a_folder(checkpoint: Checkpoint, other: Path, inner: str) -> None:
    found = with_vae(checkpoint, str(other / inner))
    assert_replaced(found, checkpoint, other)
    assert found.models["vae"].config["scaling_factor"] == 0.5
    assert found.models["vae"].config["shift_factor"] == 0.1


def test_the_weights_file_of_a_folder(checkpoint: Checkpoint, other: Path) -> None:
    found = with_vae(checkpoint, str(other / "vae" / "diffusion_pytorch_model.safetensors"))
    assert_replaced(found, checkpoint, other)
    assert found.models["vae"].config["scaling_factor"] == 0.5


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_file_in_ldm_layout(
    checkpoint: Checkpoint, other: Path, tmp_path: Path, prefix: str, suffix: str
) -> None:
    tensors = compvis_layout.prefixed(prefix, compvis_layout.vae_tensors(compvis_layout.read_weights(other, "vae")))
    trained_with = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    path = tmp_path / f"other{suffix}"
    if suffix == ".safetensors":
        save_file({**tensors, **trained_with}, path)
    else:
        torch.save({"state_dict": {**tensors, **trained_with}}, path)
    found = with_vae(checkpoint, str(path))
    assert_replaced(found, checkpoint, other)
    own = ldm_configs.family_data(checkpoint.family)["vae"]["scaling_factor"]
    assert found.models["vae"].config["scaling_factor"] == own


def test_a_whole_checkpoint_in_one_file(checkpoint: Checkpoint, other: Path, tmp_path: Path) -> None:
    path = compvis_layout.write(other, tmp_path / "whole.safetensors")
    assert_replaced(with_vae(checkpoint, str(path)), checkpoint, other)


def test_a_hub_id(checkpoint: Checkpoint, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repo_id: str, part: str) -> Path:
        asked.append((repo_id, part))
        return other

    monkeypatch.setattr(repository, "fetch_network", fetch)
    assert_replaced(with_vae(checkpoint, "maker/other-vae"), checkpoint, other)
    assert asked == [("maker/other-vae", "vae")]
    with pytest.raises(CheckpointError, match="elsewhere: no such file or folder"):
        with_vae(checkpoint, "elsewhere")


def vae_folder(folder: Path, **config: Any) -> Path:
    from diffusers import AutoencoderKL

    AutoencoderKL.from_config({**tiny_checkpoints.VAE, **config}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_channels": 16}, "latent channels 16, expected 4"),
        (tiny_checkpoints.UPSCALER_VAE, "pixels per latent 4, expected 8"),
        ({"in_channels": 4, "out_channels": 1}, "picture channels 4, expected 3; decoded channels 1, expected 3"),
    ],
)
def test_one_that_does_not_fit(
    checkpoint: Checkpoint, tmp_path: Path, config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"does not fit this sd1 checkpoint: {message}"):
        with_vae(checkpoint, str(vae_folder(tmp_path / "vae", **config)))


def test_one_of_another_class(checkpoint: Checkpoint, other: Path, tmp_path: Path) -> None:
    shutil.copytree(other / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "AutoencoderDC"}))
    with pytest.raises(CheckpointError, match="of class AutoencoderDC: expected AutoencoderKL or AutoencoderTiny"):
        with_vae(checkpoint, str(tmp_path))


def test_damaged_ones(checkpoint: Checkpoint, other: Path, tmp_path: Path) -> None:
    tensors = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    alone = tmp_path / "alone.safetensors"
    save_file(tensors, alone)
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: in diffusers' layout, but without"):
        with_vae(checkpoint, str(alone))
    save_file({"something": torch.zeros(1)}, alone)
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: no VAE in LDM's layout"):
        with_vae(checkpoint, str(alone))
    ldm = compvis_layout.vae_tensors(tensors)
    ldm.pop("decoder.mid.attn_1.norm.bias")
    save_file(ldm, alone)
    with pytest.raises(CheckpointError, match=r"missing: decoder.mid_block.attentions.0.group_norm.bias"):
        with_vae(checkpoint, str(alone))
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        with_vae(checkpoint, str(tmp_path))
