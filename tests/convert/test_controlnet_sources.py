"""What `--controlnet` takes: the tensors and the configuration are those that diffusers' own classes load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_controlnets
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import DiffusionError

WEIGHTS = "diffusion_pytorch_model.safetensors"
LEFT_TO_DEFAULTS = ("_diffusers_version", "_class_name", "_name_or_path", "_use_default_values")


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nets")
    for kind in tiny_controlnets.CONFIGS:
        tiny_controlnets.build(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def opened(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Checkpoint]:
    """``opened("sd1", source, …)``: the tiny checkpoint of a family with these ControlNets."""
    return lambda family, *sources: open_checkpoint(
        str(tiny_checkpoint(family)), ConvertOptions(controlnets=[str(source) for source in sources])
    )


def network(checkpoint: Checkpoint, name: str) -> Any:
    return torch_networks.build(checkpoint, f"ControlNet_{name}")


def check_equal(found: Any, expected: Any) -> None:
    """The same class, weights bit for bit, and every setting that has a meaning."""
    assert type(found) is type(expected)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs)
    ours, theirs = (
        {key: _plain(value) for key, value in one.config.items() if key not in LEFT_TO_DEFAULTS}
        for one in (found, expected)
    )
    assert ours == theirs


def _plain(value: Any) -> Any:
    """Tuples as lists, and a list of one number for all blocks as the number."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0] if len(set(map(str, values))) == 1 else values


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sdxl-small", "sdxl-union"])
def test_a_folder_is_what_diffusers_loads(kind: str, nets: Path, opened: Callable[..., Checkpoint]) -> None:
    import diffusers

    choice = ":3" if kind.endswith("union") else ""
    checkpoint = opened(kind.split("-")[0], f"{nets / kind}{choice}")
    (name,) = checkpoint.controlnets
    own = getattr(diffusers, tiny_controlnets.CONFIGS[kind]["_class_name"])
    check_equal(network(checkpoint, name), own.from_pretrained(nets / kind))


def test_a_union_published_as_of_the_other_class(
    nets: Path, tmp_path: Path, opened: Callable[..., Checkpoint]
) -> None:
    from diffusers import ControlNetUnionModel

    folder = tmp_path / "union"
    shutil.copytree(nets / "sdxl-union", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "ControlNetModel"}))
    checkpoint = opened("sdxl", f"{folder}:canny")
    assert checkpoint.controlnets["union-canny"].control_type == 3
    check_equal(network(checkpoint, "union-canny"), ControlNetUnionModel.from_pretrained(folder))


@pytest.mark.parametrize("form", ["control_model.pth", "control_model.safetensors", "bare.safetensors"])
def test_a_file_in_the_first_layout(
    form: str, nets: Path, tmp_path: Path, opened: Callable[..., Checkpoint]
) -> None:
    from diffusers import ControlNetModel

    tensors = tiny_controlnets.to_compvis(nets / "sd1")
    if not form.startswith("bare"):
        tensors = {f"control_model.{name}": value for name, value in tensors.items()}
        tensors["model.diffusion_model.out.2.bias"] = torch.zeros(4)  # the first files are whole checkpoints
    path = tmp_path / f"control_v1p_tiny_canny{Path(form).suffix}"
    _save(path, tensors)
    checkpoint = opened("sd1", path)
    assert list(checkpoint.controlnets) == ["control_v1p_tiny_canny"]
    own = ControlNetModel.from_single_file(str(path), config=str(nets / "sd1"))
    check_equal(network(checkpoint, "control_v1p_tiny_canny"), own)


@pytest.mark.parametrize("kind", ["sdxl", "sdxl-small", "sdxl-union"])
def test_a_file_under_diffusers_names_without_a_configuration(
    kind: str, nets: Path, tmp_path: Path, opened: Callable[..., Checkpoint]
) -> None:
    import diffusers

    path = tmp_path / "net.safetensors"
    shutil.copyfile(nets / kind / WEIGHTS, path)
    checkpoint = opened("sdxl", f"{path}:0" if kind.endswith("union") else path)
    (name,) = checkpoint.controlnets
    own = getattr(diffusers, tiny_controlnets.CONFIGS[kind]["_class_name"]).from_pretrained(nets / kind)
    found = network(checkpoint, name)
    ours, theirs = found.state_dict(), own.state_dict()
    assert all(torch.equal(ours[key].float(), theirs[key]) for key in theirs)
    with torch.inference_mode():
        given = _inputs(kind)
        assert all(map(torch.equal, _outputs(found.float(), given), _outputs(own, given)))


def test_sdxl_in_the_first_layout(nets: Path, tmp_path: Path, opened: Callable[..., Checkpoint]) -> None:
    """diffusers' mapping leaves out what embeds sizes."""
    path = tmp_path / "sdxl.safetensors"
    _save(path, tiny_controlnets.to_compvis(nets / "sdxl"))
    found = network(opened("sdxl", path), "sdxl").state_dict()
    expected = load_file(nets / "sdxl" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("yaml", "pools"), [(None, True), ("model: {params: {}}", False)])
def test_a_shuffle_gives_means(
    yaml: str | None, pools: bool, nets: Path, tmp_path: Path, opened: Callable[..., Checkpoint]
) -> None:
    path = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    _save(path, tiny_controlnets.to_compvis(nets / "sd1"))
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    checkpoint = opened("sd1", path)
    assert checkpoint.controlnets[path.stem].global_pool_conditions is pools
    assert network(checkpoint, path.stem).config.global_pool_conditions is pools
    assert any("means" in note for note in checkpoint.notes) is pools


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)


def _inputs(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 64, 64)
    union = {"controlnet_cond": [picture], "control_type": torch.eye(6)[[0, 0]], "control_type_idx": [0]}
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([999, 1]),
        "encoder_hidden_states": torch.randn(2, 77, 72),
        "added_cond_kwargs": {"time_ids": torch.ones(2, 6) * 64, "text_embeds": torch.randn(2, 24)},
        **(union if kind.endswith("union") else {"controlnet_cond": picture}),
    }


def _outputs(net: Any, given: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    down, middle = net(**given, return_dict=False)
    return (*down, middle)


# --- what is refused, in one line, before any work


def test_a_controlnet_of_another_family(nets: Path, opened: Callable[..., Checkpoint]) -> None:
    with pytest.raises(DiffusionError) as error:
        opened("sd1", nets / "sdxl")
    assert "is for another kind of model than sd1 (sd1): block_out_channels" in str(error.value)
    assert "cross_attention_dim 72, expected 32" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(
        DiffusionError, match=r"sd1: is for another kind of model than sdxl \(sdxl\).*addition_embed"
    ):
        opened("sdxl", nets / "sd1")


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("sd2-depth", "UNet takes 5 channels"),
        ("x4-upscaler", "UNet takes 7 channels"),
        ("sd1-pix2pix", "UNet takes 8 channels"),
    ],
)
def test_a_unet_that_none_is_used_with(
    family: str, why: str, nets: Path, opened: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(DiffusionError, match=why):
        opened(family, nets / "sd2")


def test_an_inpainting_unet_takes_one_for_latents_alone(nets: Path, opened: Callable[..., Checkpoint]) -> None:
    assert list(opened("sd1-inpainting", nets / "sd1").controlnets) == ["sd1"]


def test_what_is_no_controlnet(
    nets: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], opened: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(DiffusionError, match=r"no ControlNet: its config\.json is of class UNet2DConditionModel"):
        opened("sd1", tiny_checkpoint("sd1") / "unet")
    with pytest.raises(DiffusionError, match="--controlnet nothing: no such file or folder"):
        opened("sd1", "nothing")
    one = torch.zeros(1)
    for name, why in (
        ("lora_controlnet", "a Control-LoRA"),
        ("lllite_unet_input_blocks_4.down.0.weight", "a ControlNet-LLLite"),
        ("difference", "the difference from a UNet"),
        ("adapter.body.0.weight", "a T2I-Adapter"),
        ("x_embedder.weight", "expected control_model"),
    ):
        save_file({name: one}, tmp_path / "other.safetensors")
        with pytest.raises(DiffusionError, match=rf"--controlnet .*other\.safetensors: .*{why}"):
            opened("sd1", tmp_path / "other.safetensors")
    save_file({"controlnet_cond_embedding.conv_in.weight": one}, tmp_path / "cut.safetensors")
    with pytest.raises(DiffusionError, match="no whole ControlNet"):
        opened("sd1", tmp_path / "cut.safetensors")


def test_the_kind_of_pictures_of_a_union(nets: Path, opened: Callable[..., Checkpoint]) -> None:
    with pytest.raises(
        DiffusionError, match=r"is a union .*choose one, as in .*sdxl-union:segment; there are openpose"
    ):
        opened("sdxl", nets / "sdxl-union")
    with pytest.raises(DiffusionError, match="choose one"):
        opened("sdxl", f"{nets / 'sdxl-union'}:tile")  # of "promax" alone, with eight kinds
    with pytest.raises(DiffusionError, match="takes one kind of pictures: leave out :canny"):
        opened("sdxl", f"{nets / 'sdxl'}:canny")


def test_two_of_one_name_and_twenty_of_twenty(
    nets: Path, tmp_path: Path, opened: Callable[..., Checkpoint]
) -> None:
    for name in ("a/my_net", "b/My-Net"):
        shutil.copytree(nets / "sd1", tmp_path / name)
    with pytest.raises(DiffusionError, match=r"would have the same file name, controlnet/MyNet\.mlmodelc: rename"):
        opened("sd1", tmp_path / "a" / "my_net", tmp_path / "b" / "My-Net")
    with pytest.raises(DiffusionError, match="is given twice"):
        opened("sd1", *[nets / "sd1"] * 20)
    sources = []
    for number in range(20):
        sources.append(tmp_path / f"net{number}.safetensors")
        sources[-1].hardlink_to(nets / "sd1" / WEIGHTS)
    assert len(opened("sd1", *sources).controlnets) == 20
