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
    "source": {"name": "org/tiny", "revision": "abc", "license": "mit"},
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
    source = {"name": "org/tiny", "licence": "mit"}
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps({**MADE, "tools": tools, "source": source}))
    read = manifest.read(tmp_path)
    assert (read.tools, read.source.license) == (tools, "mit")
    manifest.write(read, tmp_path)
    assert json.loads((tmp_path / manifest.FILE_NAME).read_text())["source"] == {
        "name": "org/tiny",
        "license": "mit",
        "loras": [],
        "embeddings": [],
    }


def changed(*path: str | int, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(MADE))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return dict(data)


LATENTS, INPUT = ("latents",), ("components", "unet", "inputs", 0)
WRONG: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    (*LATENTS, "channels"): (0, -4, 10**9, 10**30, 4.5, "x", None, [4]),
    (*LATENTS, "factor"): (0, -8, 10**9, float("inf")),
    (*LATENTS, "scale"): (0, 0.0, -0.0, 1e-300, 1e300, float("inf"), None, "x"),
    (*LATENTS, "shift"): (float("-inf"), 1e9, []),
    ("height",): (0, -64, 1, 63, 10**9, 64.5),
    ("width",): (0, 100, 10**12),
    ("batch_size",): (0, -1, 10**9),
    ("prediction_type",): ("", "v", "velocity", None),
    (*INPUT, "shape"): ([], [1, -7], [0], [1, 10**12], [1] * 9, "4", [None]),
    (*INPUT, "dtype"): ("", "float128", "object", "O"),
    ("scheduler",): ([], None, "x"),
    ("scheduler", "num_train_timesteps"): (0, -1000, 10**9, "x", 1.5, None),
    ("scheduler", "beta_start"): (-1, 1, float("inf"), "x", None, []),
    ("scheduler", "beta_end"): (0, 2, -0.1),
    ("scheduler", "trained_betas"): ([], [2], ["x"], [0.1] * 200_000, 7),
    ("scheduler", "steps_offset"): (10**9, "x", -(10**9)),
    ("scheduler", "prediction_type"): ("v", 3),
    ("noise_scheduler",): ({"num_train_timesteps": -1}, 3),
    ("tokenizer",): ("a\0b", "../x"),
    ("components", "unet", "files"): (["a\0.mlpackage"],),
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(path, value, id=f"{'.'.join(map(str, path))}-{str(value)[:12]!r}")
        for path, values in WRONG.items()
        for value in values
    ],
)
def test_values_that_no_model_can_have_are_refused(tmp_path: Path, path: tuple[str | int, ...], value: Any) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps(changed(*path, value=value)))
    with pytest.raises(PackageError, match=r"manifest\.json: not a valid manifest: ") as caught:
        manifest.read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path[-1]) in str(caught.value) or str(path[0]) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("latents", "scale"), 0.08333),
        (("latents", "scale"), -1.5),
        (("latents", "shift"), -0.0609),
        (("latents", "channels"), 16),
        (("scheduler", "lambda_min_clipped"), float("-inf")),
        (("scheduler", "trained_betas"), None),
        (("scheduler", "steps_offset"), 0),
        (("components", "unet", "outputs", 0, "shape"), []),
        (("height",), 2048),
    ],
)
def test_values_that_models_have_are_read(tmp_path: Path, path: tuple[str | int, ...], value: Any) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(json.dumps(changed(*path, value=value)))
    found: Any = manifest.read(tmp_path).model_dump()
    for key in path:
        found = found[key]
    assert (list(found) if isinstance(found, tuple) else found) == value
