"""manifest.json: what is written is read back, and what cannot be trusted is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import PackageError

MADE: dict[str, Any] = {
    "name": "tiny",
    "family": "sd2-v",
    "source": {"name": "org/tiny", "revision": "abc", "licence": "mit"},
    "kind": "packages",
    "attention": "original",
    "height": 96,
    "width": 64,
    "batch_size": 2,
    "target": "macOS13",
    "latents": {"channels": 4, "factor": 8, "scale": 0.13025, "shift": 0.1},
    "prediction_type": "v_prediction",
    "components": {
        "unet": {
            "files": ["one.mlpackage", "two.mlpackage"],
            "inputs": [{"name": "sample", "dtype": "float16", "shape": [2, 4, 12, 8]}],
            "outputs": [{"name": "noise_pred", "dtype": "float32", "shape": [2, 4, 12, 8]}],
            "psnr_db": {"noise_pred": float("inf")},
        }
    },
    "scheduler": {"_class_name": "DDIMScheduler", "beta_start": 0.00085},
}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = manifest.Manifest.model_validate(MADE)
    manifest.write(made, tmp_path)
    assert manifest.read(tmp_path) == made
    assert made.components["unet"].files == ("one.mlpackage", "two.mlpackage")


def test_keys_of_a_later_minor_version_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps({**MADE, "invented": {"by": "the future"}}))
    assert manifest.read(tmp_path).name == "tiny"


@pytest.mark.parametrize("path", ["../outside.mlpackage", "/etc/passwd", "a/../../b", "..\\b", ""])
@pytest.mark.parametrize("place", ["files", "tokenizer", "sha256"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, path: str, place: str) -> None:
    data = json.loads(json.dumps(MADE))
    if place == "files":
        data["components"]["unet"]["files"] = [path]
    elif place == "tokenizer":
        data["tokenizer"] = path
    else:
        data["components"]["unet"]["sha256"] = {path: "0" * 64}
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(PackageError, match="not a valid manifest"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format_version": "2"}', '{"format_version": 0}'])
def test_damaged_files_are_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(text)
    with pytest.raises(PackageError, match=r"manifest\.json: ") as caught:
        manifest.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_future_is_refused_politely(tmp_path: Path) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps({**MADE, "format_version": 2}))
    with pytest.raises(PackageError, match=r"newer than this version reads .*pip install --upgrade"):
        manifest.read(tmp_path)


def test_manifests_of_the_time_before_the_new_name_are_read(tmp_path: Path) -> None:
    tools = {"coreml-diffusion": "0.1.0", "torch": "2.13.0"}
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps({**MADE, "tools": tools}))
    assert manifest.read(tmp_path).tools == tools
