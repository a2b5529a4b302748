"""Checkpoints on the Hub, against a server on this machine: one commit, only what is needed, and the cache."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

import tiny_adapters
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.repository import checkpoint_files, fetch_network, is_repository_id, network_files
from diffusion_convert.hub import client
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import CheckpointError, HubError, InputError
from hub_server import Hub, serving
from tiny_checkpoints import SD1_TEXT

REPO = "maker/model"
TOKEN = "hf_test"  # noqa: S105  no secret: the server here takes any
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def hub(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with a checkpoint and much that is not needed; the cache is an empty one."""
    folder = tiny_checkpoint("sd2-base")
    with serving(Hub()) as running:
        running.exists = True
        running.commits = ["first"]
        running.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        running.files |= {f"{part}/{stem}.bin": b"not needed" for part, stem in WEIGHTS.items()}
        running.files |= {f"{part}/{stem}.fp16.bin": b"not needed" for part, stem in WEIGHTS.items()}
        running.files |= {"v2.ckpt": b"not needed", "unet/flax_model.msgpack": b"not needed"}
        running.files |= {"README.md": b"---\nlicense: openrail++\n---\n", "code.py": b"raise SystemExit"}
        monkeypatch.setattr(client, "open_api", lambda *_: HfApi(endpoint=running.endpoint, token=TOKEN))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield running


def test_one_commit_and_only_what_is_needed(hub: Hub, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(REPO)
    assert checkpoint.family == "sd2-base"
    assert (checkpoint.source.name, checkpoint.source.revision) == (REPO, hub.commit)
    assert checkpoint.source.license == "openrail++"
    expected = load_file(tiny_checkpoint("sd2-base") / "unet" / "diffusion_pytorch_model.safetensors")
    found = checkpoint.models["unet"].tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    fetched = {path.split("/resolve/")[1] for path in hub.requests if "/resolve/" in path}
    assert {name.split("/")[0] for name in fetched} == {hub.commit}
    files = {name.split("/", 1)[1] for name in fetched}
    assert not [name for name in files if name.endswith((".bin", ".ckpt", ".msgpack", ".py"))]
    assert "unet/diffusion_pytorch_model.safetensors" in files


def test_an_ip_adapter_with_the_image_encoder_beside_it(
    hub: Hub, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, folder = tiny_checkpoint("sd1"), tmp_path / "published"
    tiny_adapters.write_encoder(folder / "models" / "image_encoder")
    name = "models/ip-adapter_sd15.safetensors"
    tiny_adapters.write_ip_adapter(folder / name, source)
    hub.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    needed = set(hub.files)
    hub.files |= {"models/ip-adapter_sd15.bin": b"not needed", "models/image_encoder/model.bin": b"not needed"}
    checkpoint = open_checkpoint(str(source), ConvertOptions(ip_adapters=[f"{REPO}/{name}"]))
    assert [one.name for one in checkpoint.ip_adapters] == ["ip-adapter_sd15"]
    assert {"image_encoder", "image_projection"} <= set(checkpoint.models)
    fetched = {path.split(f"{hub.commit}/")[1] for path in hub.requests if "/resolve/" in path}
    assert fetched == needed
    apart = f"{REPO}/models/image_encoder"
    again = open_checkpoint(str(source), ConvertOptions(ip_adapters=[str(folder / name)], image_encoder=apart))
    assert again.models["image_encoder"].config == checkpoint.models["image_encoder"].config
    with pytest.raises(CheckpointError, match=r"has no file models/none\.bin"):
        open_checkpoint(str(source), ConvertOptions(ip_adapters=[f"{REPO}/models/none.bin"]))
    with pytest.raises(CheckpointError, match=r"has no folder other with a config\.json"):
        open_checkpoint(
            str(source), ConvertOptions(ip_adapters=[str(folder / name)], image_encoder=f"{REPO}/other")
        )


@pytest.mark.parametrize("revision", [None, "fp16", "refs/pr/1"])
def test_without_a_connection_the_cache_is_used(
    revision: str | None, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = open_checkpoint(REPO, ConvertOptions(revision=revision))
    by_name = [path for path in hub.requests if hub.commit not in path]
    assert len(by_name) == 1, f"the name was resolved more than once: {by_name}"
    monkeypatch.setattr(client, "open_api", lambda *_: HfApi(endpoint="http://127.0.0.1:9"))
    offline = open_checkpoint(REPO, ConvertOptions(revision=revision))
    assert offline.source == online.source
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_checkpoint(REPO, ConvertOptions(revision=revision)).source == online.source


def test_without_a_connection_and_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "open_api", lambda *_: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(HubError, match="cannot be reached, and its cache does not hold"):
        open_checkpoint(REPO)


def test_no_such_repository(hub: Hub) -> None:
    hub.exists = False
    with pytest.raises(InputError, match="no such repository, or it is private or gated"):
        open_checkpoint(REPO)


def test_a_controlnet(hub: Hub, tiny_checkpoint: Callable[[str], Path], controlnets: Callable[[str], Path]) -> None:
    """Only its configuration, its card and the best of its weights; its name is the repository's."""
    net = controlnets("sd1") / "tile"
    weights = "diffusion_pytorch_model.fp16.safetensors"
    data = (net / "diffusion_pytorch_model.safetensors").read_bytes()
    hub.files = {
        "config.json": (net / "config.json").read_bytes(),
        weights: data,
        "README.md": hub.files["README.md"],
    }
    hub.files |= {"diffusion_pytorch_model.bin": b"not needed", "images/bird.png": b"not needed"}
    opened = open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(controlnets=[REPO]))
    ((name, told),) = opened.controlnets.items()
    assert name == REPO.replace("/", "_")
    assert (told.source.name, told.source.revision, told.source.license) == (REPO, hub.commit, "openrail++")
    (file,) = opened.models[f"ControlNet_{name}"].files
    assert file.name == weights
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"config.json", weights, "README.md"}

    alone = "control_v11f1e_sd15_tile.safetensors"
    hub.files = {alone: data, "other.pth": b"not needed"}
    hub.commits.append("second")
    again = open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(controlnets=[f"{REPO}/{alone}"]))
    assert list(again.controlnets) == ["control_v11f1e_sd15_tile"]


def test_a_textual_inversion(hub: Hub, tiny_checkpoint: Callable[[str], Path]) -> None:
    data = io.BytesIO()
    torch.save({"<toy>": torch.ones(int(SD1_TEXT["hidden_size"]))}, data)
    hub.files = {name: data.getvalue() for name in ("learned_embeds.bin", "more/late.bin")}
    hub.files |= {"README.md": b"", "concept_images/1.jpeg": b"not needed"}
    for place in (REPO, f"{REPO}/more/late.bin"):
        opened = open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(embeddings=[place]))
        assert opened.added_tokens == ("<toy>",)
    hub.files.pop("learned_embeds.bin")
    hub.commits.append("second")
    with pytest.raises(CheckpointError, match=r"no learned_embeds\.bin: name a file"):
        open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(embeddings=[REPO]))


def test_no_checkpoint_in_the_repository(hub: Hub) -> None:
    hub.files = {"model.gguf": b"x"}
    with pytest.raises(CheckpointError, match=r"has no model_index\.json \(it has model\.gguf\)"):
        open_checkpoint(REPO)


def test_a_vae_alone(hub: Hub) -> None:
    hub.files = {name.removeprefix("vae/"): data for name, data in hub.files.items() if name.startswith("vae/")}
    folder = fetch_network(REPO, "vae")
    assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


INDEX = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["m.safetensors", "m.fp16.safetensors", "m.bin"], ["m.fp16.safetensors"]),
        (["m.safetensors", "m.non_ema.safetensors"], ["m.safetensors"]),
        (["m.bin", "m.fp16.bin"], ["m.fp16.bin"]),
        (["m.safetensors.index.json", "a.safetensors", "b.safetensors"], None),
    ],
)
def test_which_weights_are_fetched(there: list[str], wanted: list[str] | None) -> None:
    there = [name.replace("m.", "diffusion_pytorch_model.", 1) for name in there]
    expected = [name.replace("m.", "diffusion_pytorch_model.", 1) for name in wanted] if wanted else there

    def read_json(name: str) -> Mapping[str, Any]:
        return {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}} if ".index." in name else INDEX

    names = frozenset(["model_index.json", "unet/config.json", "safety_checker/config.json"])
    found = checkpoint_files(names | {f"unet/{name}" for name in there}, read_json)
    assert set(found) == {"model_index.json", "unet/config.json", *(f"unet/{name}" for name in expected)}
    alone = network_files(frozenset(["config.json", *there]), read_json, "vae")
    assert set(alone) == {"config.json", *expected}


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("runwayml/stable-diffusion-v1-5", True),
        ("./model", False),
        ("../model", False),
        ("model", False),
        ("/model", False),
        ("models/file.safetensors", False),
        ("a/b/c", False),
        ("~/model", False),
    ],
)
def test_what_is_taken_for_a_repository(source: str, is_one: bool) -> None:
    assert is_repository_id(source) == is_one
