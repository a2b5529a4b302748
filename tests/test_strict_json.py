"""The reader of JSON, and that every reader of a file goes through it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from diffusion_convert.checkpoint import diffusers_folder, ldm_configs, vocabulary
from diffusion_convert.checkpoint.lora import settings as lora_settings
from diffusion_convert.palettize import recipe
from diffusion_runtime import images, strict_json
from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import CheckpointError, DiffusionError, InputError, PackageError
from diffusion_runtime.mil.package import specification_path
from diffusion_runtime.prompt import tokenizer

DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "arrays": DEEP,
    "objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "mixed": '{"a":[' * 40 + "]}" * 40,
    "just too deep": "[" * 65 + "]" * 65,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "fewer digits": '{"a": -' + "9" * 41 + "}",
    "overflow": '{"a": 1e400}',
    "NaN": '{"a": NaN}',
    "a surrogate": '{"a": "\\ud800"}',
    "a surrogate as a key": '{"a": [{"\\uDC00": 1}]}',
    "cut off": '{"a": [1, 2',
    "no JSON": "version https://git-lfs",
    "empty": "",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


def _recipe(path: Path) -> None:
    recipe.load_recipe(path)


def _beside_a_lora(path: Path) -> None:
    save_file({}, path.parent / "adapter_model.safetensors")
    path.rename(path.parent / "adapter_config.json")
    lora_settings.beside(path.parent / "adapter_model.safetensors")


def _in_a_lora(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lora_settings.in_header(path.parent / "lora.safetensors", {lora_settings.METADATA_KEY: text})


def _in_a_picture(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(images.METADATA_KEY, path.read_text(encoding="utf-8"))
    Image.new("RGB", (8, 8)).save(path.with_name("p.png"), pnginfo=info)
    images.read_metadata(path.with_name("p.png"))


def _under_name(name: str, read: Callable[[Path], object]) -> Callable[[Path], None]:
    """Read the folder that holds the file under ``name``."""

    def reader(path: Path) -> None:
        path.rename(path.parent / name)
        read(path.parent)

    return reader


def _tokenizer(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer.load(folder)


READERS: dict[str, Callable[[Path], None]] = {
    "manifest": _under_name("manifest.json", manifest.read),
    "package": _under_name("Manifest.json", specification_path),
    "model index": _under_name("model_index.json", lambda f: diffusers_folder.read_json(f / "model_index.json")),
    "network": _under_name("config.json", lambda f: diffusers_folder.read_submodel(f, "AutoencoderKL")),
    "beside a single file": _under_name("a.config.json", lambda f: ldm_configs.read_beside(f / "a.safetensors")),
    "recipe": _recipe,
    "vocabulary": _under_name("vocab.json", _tokenizer),
    "fast tokenizer": _under_name(
        "tokenizer.json", lambda f: vocabulary.check_vocabulary({"tokenizer.json": f / "tokenizer.json"})
    ),
    "LoRA's folder": _beside_a_lora,
    "LoRA's metadata": _in_a_lora,
    "picture": _in_a_picture,
}


INSIDE_TEXTS = (_in_a_lora, _in_a_picture)
"""What can hold Unicode only."""


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        pytest.param(reader, text, id=f"{name}-{kind}")
        for name, reader in READERS.items()
        for kind, text in HOSTILE.items()
        if isinstance(text, str) or reader not in INSIDE_TEXTS
    ],
)
def test_every_reader_refuses_in_one_line(
    tmp_path: Path, reader: Callable[[Path], None], text: str | bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DiffusionError) as caught:
        reader(path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * 64 + "]" * 64, None),
        ('{"a": 18446744073709551615}', {"a": 2**64 - 1}),
        ('{"model_max_length": 1000000000000000019884624838656}', {"model_max_length": int(1e30)}),
        ('{"lambda_min_clipped": -Infinity}', {"lambda_min_clipped": float("-inf")}),
        ('\ufeff{"a": 1}', {"a": 1}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ('{"a": 0.00085000000000000000000000000000000000000000000000000001}', {"a": 0.00085}),
        (json.dumps([[]] * 100_000), [[]] * 100_000),
    ],
)
def test_what_people_write_is_read(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = strict_json.read(tmp_path / "a.json", InputError)
    assert value is None or found == value


def test_depth_is_counted_as_nesting() -> None:
    assert strict_json.parse("[" * 64 + "]" * 64, "x", InputError) is not None
    with pytest.raises(InputError, match=r"^x: cannot be read as JSON: it is nested more than 64 deep$"):
        strict_json.parse("[" * 65 + "]" * 65, "x", InputError)


@pytest.mark.parametrize("error", [InputError, PackageError, CheckpointError])
def test_the_caller_names_the_kind_of_error(tmp_path: Path, error: type[DiffusionError]) -> None:
    with pytest.raises(error, match=r"gone\.json: missing"):
        strict_json.read(tmp_path / "gone.json", error)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(error, match=r"a\.json: expected a JSON object, got list"):
        strict_json.read_object(tmp_path / "a.json", error)


def test_size_and_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" " * (1 << 20) + "1")
    with pytest.raises(InputError, match="larger than 1 MiB"):
        strict_json.read(tmp_path / "a.json", InputError, limit=1 << 20)
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            strict_json.read(path, InputError)
    for name in ("a\0b", "\udc80", "x" * 300):
        with pytest.raises(InputError):
            strict_json.read(tmp_path / name, InputError)
