"""UNets without the rest of a checkpoint, as diffusers loads them: `--base` gives the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import compvis_layout
import tiny_checkpoints
from diffusion_convert import ConvertOptions
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.plan import make_plan
from diffusion_convert.hub import client
from diffusion_runtime.errors import CheckpointError, InputError
from hub_server import Hub, serving

FILE = "diffusion_pytorch_model.safetensors"
FAMILIES = ("sd1", "sd1-inpainting", "sd2-base", "sd2-v", "x4-upscaler", "sdxl")
PREFIXES = ("", "unet.", "model.diffusion_model.", "diffusion_model.")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of another checkpoint of that family."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoints.build(family, tmp_path_factory.mktemp("other") / family, seed=5)
        return made[family]

    return build


def theirs(place: Path, base: Path | None = None) -> Any:
    """diffusers' UNet: of a folder, or of a file with the configuration of ``base``."""
    from diffusers import UNet2DConditionModel

    load: Any = UNet2DConditionModel
    with torch_networks.silent():
        if base is None:
            return load.from_pretrained(str(place), torch_dtype=torch.float32)
        return load.from_single_file(
            str(place), config=str(base), subfolder="unet", local_files_only=True, torch_dtype=torch.float32
        )


def assert_draws_as(checkpoint: Checkpoint, expected: Any) -> None:
    config = expected.config
    torch.manual_seed(0)
    asked: dict[str, Any] = {
        "sample": torch.randn(1, config.in_channels, 8, 8),
        "timestep": torch.tensor([501]),
        "encoder_hidden_states": torch.randn(1, 7, config.cross_attention_dim),
    }
    if config.num_class_embeds:
        asked["class_labels"] = torch.tensor([3])
    if config.addition_embed_type:
        asked["added_cond_kwargs"] = {"time_ids": torch.ones(1, 6), "text_embeds": torch.randn(1, 24)}
    ours = torch_networks.build(checkpoint, "unet").float()
    with torch.inference_mode():
        torch.testing.assert_close(ours(**asked).sample, expected(**asked).sample, rtol=1e-4, atol=1e-5)


NAMES = (
    *(("diffusers", prefix) for prefix in PREFIXES),
    *(("LDM", prefix) for prefix in PREFIXES if prefix != "unet."),
)


@pytest.mark.parametrize(
    ("family", "layout", "prefix"),
    [
        (family, *names)
        for turn, family in enumerate(FAMILIES)
        for number, names in enumerate(NAMES)
        if family == "sd1" or (turn + number) % 3 == 0  # both layouts, and each prefix with several families
    ],
)
def test_a_file_under_any_name(
    tiny_checkpoint: Callable[[str], Path],
    other: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    layout: str,
    prefix: str,
) -> None:
    """What its shapes do not show (heads, of tiny widths) is the base's."""
    folder = other(family)
    tensors: Mapping[str, torch.Tensor] = load_file(folder / "unet" / FILE)
    if layout == "LDM":
        tensors = compvis_layout.unet_tensors(tensors, compvis_layout.read_config(folder, "unet"))
    save_file({f"{prefix}{name}": value for name, value in tensors.items()}, tmp_path / "mine.safetensors")
    found = open_checkpoint(str(tmp_path / "mine.safetensors"), ConvertOptions(base=str(tiny_checkpoint(family))))
    assert (found.family, found.name) == (family, "mine")
    assert_draws_as(found, theirs(folder / "unet"))
    make_plan(found, ConvertOptions(attention="original"))


@pytest.mark.parametrize("heads", [2, 4, 16])
def test_heads_are_those_of_the_base(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, heads: int) -> None:
    base = tiny_checkpoints.build("sd1", tmp_path / "base", attention_head_dim=heads, act_fn="gelu")
    path = shutil.copyfile(tiny_checkpoint("sd1") / "unet" / FILE, tmp_path / "mine.safetensors")
    assert_draws_as(open_checkpoint(str(path), ConvertOptions(base=str(base))), theirs(path, base))


@pytest.mark.parametrize("kind", ["file", "folder", "folder of the checkpoint"])
def test_a_configuration_beside_the_weights_counts(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    made = tiny_checkpoints.build("sd2-v", tmp_path / "mine", seed=5, attention_head_dim=[4, 8])
    if kind != "folder of the checkpoint":
        shutil.move(made / "unet", tmp_path / "alone")
    place = {"file": tmp_path / "alone" / FILE, "folder": tmp_path / "alone"}.get(kind, made / "unet")
    found = open_checkpoint(str(place), ConvertOptions(base=str(tiny_checkpoint("sd2-v"))))
    assert found.name == ("mine" if kind == "folder of the checkpoint" else "alone")
    assert_draws_as(found, theirs(place if place.is_dir() else place.parent))


@pytest.mark.parametrize("variant", ["non_ema", "ema", "bf16"])
@pytest.mark.parametrize("which", ["the folder's", "the base's"])
def test_variants(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, variant: str, which: str) -> None:
    """Of a UNet's folder they are its own; a single file has none, so they are the base's."""
    mine, base = (shutil.copytree(tiny_checkpoint("sd1"), tmp_path / name) for name in ("mine", "base"))
    folder, name = (
        (mine / "unet", FILE) if which == "the folder's" else (base / "text_encoder", "model.safetensors")
    )
    changed = {key: value * 1.5 for key, value in load_file(folder / name).items() if value.is_floating_point()}
    save_file(changed, folder / name.replace(".", f".{variant}.", 1))
    source = folder if which == "the folder's" else mine / "unet" / FILE
    found = open_checkpoint(str(source), ConvertOptions(base=str(base), variant=variant))
    part = "unet" if which == "the folder's" else "text_encoder"
    tensors = found.models[part].tensors()
    assert all(torch.equal(tensors[key], value) for key, value in changed.items())
    with pytest.raises(CheckpointError, match=r"has no model_index\.json.*for a UNet alone, --base gives the rest"):
        open_checkpoint(str(mine / "unet"))
    with pytest.raises(InputError, match=rf"--variant nothing: .*it has {variant}$"):
        open_checkpoint(str(source), ConvertOptions(base=str(base), variant="nothing"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "UNet3DConditionModel"},
            "is of class UNet3DConditionModel: expected UNet2DConditionModel",
        ),
        ({"in_channels": 6}, "6 input channels"),
        ({"encoder_hid_dim": 64}, "encoder_hid_dim 64"),
        ({"cross_attention_dim": 40}, "the text encoder gives states of 32 channels, but the UNet takes 40"),
    ],
)
def test_a_unet_for_something_else_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(tiny_checkpoint("sd1") / "unet", tmp_path / "unet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((CheckpointError, InputError), match=message) as caught:
        open_checkpoint(str(folder), ConvertOptions(base=str(tiny_checkpoint("sd1"))))
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as running:
        running.exists = True
        running.commits = ["first"]
        monkeypatch.setattr(client, "open_api", lambda *_: HfApi(endpoint=running.endpoint, token="hf_test"))  # noqa: S106
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_a_repository_of_a_unet_alone(
    hub: Hub,
    tiny_checkpoint: Callable[[str], Path],
    other: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    variant: str | None,
) -> None:
    hub.files = contents(other("sd1") / "unet") | {"README.md": b"---\nlicense: mit\n---\n", "x.bin": b"not needed"}
    if variant:
        hub.files[f"diffusion_pytorch_model.{variant}.safetensors"] = hub.files.pop(FILE)
    base = str(tiny_checkpoint("sd1"))
    found = open_checkpoint("maker/unet", ConvertOptions(base=base, variant=variant))
    assert (found.source.name, found.source.revision, found.source.license) == ("maker/unet", hub.commit, "mit")
    assert_draws_as(found, theirs(other("sd1") / "unet"))
    assert not [path for path in hub.requests if "x.bin" in path]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_checkpoint("maker/unet", ConvertOptions(base=base, variant=variant)).source == found.source


@pytest.mark.parametrize("variant", [None, "non_ema"])
def test_a_base_on_the_hub(
    hub: Hub,
    tiny_checkpoint: Callable[[str], Path],
    other: Callable[[str], Path],
    tmp_path: Path,
    variant: str | None,
) -> None:
    hub.files = contents(tiny_checkpoint("sd2-base"))
    if variant:
        hub.files[f"vae/diffusion_pytorch_model.{variant}.safetensors"] = hub.files[f"vae/{FILE}"]
    path = shutil.copyfile(other("sd2-base") / "unet" / FILE, tmp_path / "mine.safetensors")
    found = open_checkpoint(str(path), ConvertOptions(base="maker/model", variant=variant))
    assert_draws_as(found, theirs(other("sd2-base") / "unet"))
    assert [file.name for file in found.models["vae"].files] == [
        f"diffusion_pytorch_model.{variant}.safetensors" if variant else FILE
    ]
    with pytest.raises(InputError, match=r"--base maker/model: maker/model is no single file and no UNet alone"):
        open_checkpoint("maker/model", ConvertOptions(base="maker/model"))
    with pytest.raises(InputError, match=r"--base --variant nothing: .*it has "):
        open_checkpoint(str(path), ConvertOptions(base="maker/model", variant="nothing"))
