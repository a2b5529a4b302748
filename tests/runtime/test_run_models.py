"""`coreml-sd run-models`: the protocol by which programs in other languages run models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy_models
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.errors import InputError
from diffusion_runtime.run_models import serve


def _asked(*messages: bytes) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    answers = io.BytesIO()
    serve(TorchBackend(), io.BytesIO(b"".join(messages)), answers)
    answers.seek(0)
    found = []
    while line := answers.readline():
        answer = json.loads(line)
        arrays = {}
        for entry in answer.get("arrays", []):
            count = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
            arrays[entry["name"]] = np.frombuffer(answers.read(count), entry["dtype"]).reshape(entry["shape"])
        found.append((answer, arrays))
    return found


def _line(**request: Any) -> bytes:
    return json.dumps(request).encode() + b"\n"


def test_a_model_is_loaded_run_and_released(toy_folder: Path) -> None:
    package = next(toy_folder.glob("*_vae_decoder.mlpackage"))
    model = TorchBackend().load(package)
    (spec,) = model.inputs.values()
    given = np.linspace(-1, 1, int(np.prod(spec.shape))).reshape(spec.shape).astype(spec.dtype)
    entry = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
    predict = _line(do="predict", model=1, arrays=[entry]) + given.tobytes()
    (loaded, _), (_, results), (released, _), (gone, _) = _asked(
        _line(do="load", path=str(package)), predict, _line(do="release", model=1), predict
    )
    assert loaded["model"] == 1 and loaded["inputs"] == [entry] and loaded["outputs"][0]["name"] == "image"
    np.testing.assert_array_equal(results["image"], model(**{spec.name: given})["image"])
    assert released == {}
    assert "no such model" in gone["error"]


def test_what_the_author_wrote_and_all_shapes_are_answered(tmp_path: Path) -> None:
    package = toy_models.described(tmp_path / "described.mlpackage")
    given = np.linspace(-1, 1, 6, dtype=np.float16).reshape(3, 2)
    entry = {"name": "x", "dtype": "float16", "shape": [3, 2]}
    predict = _line(do="predict", model=1, arrays=[entry]) + given.tobytes()
    (loaded, _), (_, results) = _asked(_line(do="load", path=str(package)), predict)
    assert loaded["metadata"] == {
        "description": "Two shapes",
        "version": "1.2",
        "author": "Å. Author",
        "license": "MIT",
        "user_defined": {"coreml_sd.key": "value"},
    }
    assert loaded["inputs"] == [{**entry, "shape": [1, 2], "shapes": [[1, 2], [3, 2]]}]
    np.testing.assert_allclose(results["y"], np.tanh(given.astype(np.float32)), atol=1e-3)


def test_what_the_author_left_out_is_empty(toy_folder: Path) -> None:
    ((loaded, _),) = _asked(_line(do="load", path=str(next(toy_folder.glob("*_vae_decoder.mlpackage")))))
    about = loaded["metadata"]
    assert [about.pop(name) for name in ("description", "version", "author", "license")] == [""] * 4
    assert list(about) == ["user_defined"] and "com.github.apple.coremltools.version" in about["user_defined"]


def test_what_cannot_be_done_is_answered_and_the_next_request_is_read(tmp_path: Path, toy_folder: Path) -> None:
    package = next(toy_folder.glob("*_vae_decoder.mlpackage"))
    array = {"name": "y", "dtype": "float32", "shape": [2]}
    answers = _asked(
        _line(do="load", path=str(tmp_path / "no.mlpackage")),
        _line(do="fly"),
        _line(do="load", path=str(package)),
        _line(do="predict", model=1, arrays=[array]) + bytes(8),
        _line(do="release", model=1),
    )
    assert "no.mlpackage" in answers[0][0]["error"]
    assert "expected one of load" in answers[1][0]["error"]
    assert "unknown y" in answers[3][0]["error"] and "missing z" in answers[3][0]["error"]
    assert answers[4][0] == {}


@pytest.mark.parametrize(
    "message",
    [
        b"hello\n",
        b"[1]\n",
        b'{"do": "load"}',
        _line(do="predict", arrays=[{"name": "x", "dtype": "float32", "shape": [4]}]) + bytes(3),
        _line(do="predict", arrays=[{"name": "x", "dtype": "object", "shape": [4]}]),
        _line(do="predict", arrays=[{"name": "x", "dtype": "float32", "shape": [-4]}]),
        _line(do="predict", arrays=[{"name": "x", "dtype": "float32", "shape": [1 << 40]}]),
    ],
)
def test_a_message_after_which_nobody_knows_what_follows_ends_the_program(message: bytes) -> None:
    with pytest.raises(InputError, match="run-models"):
        _asked(message)
