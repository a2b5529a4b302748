"""UNets in GGUF files: as diffusers and the package gguf read them, and damaged ones in one line."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

import compvis_layout
import gguf_files
import tiny_checkpoints
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint import gguf_file, ldm_names, torch_networks
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_runtime.errors import CheckpointError, InstallationError

UNET = "diffusion_pytorch_model.safetensors"
FIRST = "input_blocks.0.0.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL with other weights than the base's."""
    return tiny_checkpoints.build("sdxl", tmp_path_factory.mktemp("other") / "sdxl", seed=5)


@pytest.fixture(scope="module")
def ldm(other: Path) -> Tensors:
    return compvis_layout.unet_tensors(load_file(other / "unet" / UNET), compvis_layout.read_config(other, "unet"))


def package_reads(path: Path) -> Tensors:
    """Every weight as the package's own reader and decoder have it, in the shape that it had."""
    reader, found = gguf.GGUFReader(path), dict[str, torch.Tensor]()
    for stored in reader.tensors:
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        given = reader.get_field(f"comfy.gguf.orig_shape.{stored.name}")
        shape = given.contents() if given is not None else stored.shape.tolist()[::-1]
        found[stored.name] = torch.from_numpy(values.copy()).reshape(shape)
    return found


KINDS = ("F16", "F32", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize(
    ("kind", "prefix"), [(kind, "model.diffusion_model." * (number % 2)) for number, kind in enumerate(KINDS)]
)
def test_weights_are_those_that_the_package_decodes(
    kind: str, prefix: str, ldm: Tensors, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = gguf_files.write(tmp_path / "mine.gguf", {f"{prefix}{name}": value for name, value in ldm.items()}, kind)
    checkpoint = open_checkpoint(str(path), ConvertOptions(base=str(tiny_checkpoint("sdxl"))))
    assert (checkpoint.name, checkpoint.family) == ("mine", "sdxl")
    found = checkpoint.models["unet"].tensors()
    config = checkpoint.models["unet"].config
    stored = {name.removeprefix(prefix): value for name, value in package_reads(path).items()}
    expected = ldm_names.unet(stored, config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(
            found[name].float(), value if found[name].dtype != torch.float16 else value.half().float()
        )
    if kind.startswith("Q"):
        sizes = {stored.tensor_type.name for stored in gguf.GGUFReader(path).tensors}
        assert kind in sizes


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_the_unet_computes_what_diffusers_does(
    kind: str, ldm: Tensors, other: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Of diffusers' own reading: it knows no file whose weights were put into other rows."""
    from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

    prefixed = {f"model.diffusion_model.{name}": value for name, value in ldm.items()}
    path = gguf_files.write(tmp_path / "mine.gguf", prefixed, kind, new_rows=False)
    load: Any = UNet2DConditionModel
    theirs = load.from_single_file(
        str(path),
        config=str(other),
        subfolder="unet",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    ours = torch_networks.build(
        open_checkpoint(str(path), ConvertOptions(base=str(tiny_checkpoint("sdxl")))), "unet"
    ).float()
    torch.manual_seed(0)
    asked = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([501]),
        "encoder_hidden_states": torch.randn(1, 7, theirs.config.cross_attention_dim),
        "added_cond_kwargs": {"time_ids": torch.ones(1, 6), "text_embeds": torch.randn(1, 24)},
    }
    with torch.inference_mode():
        torch.testing.assert_close(ours(**asked).sample, theirs(**asked).sample, rtol=1e-2, atol=1e-3)


def test_a_quantised_unet_is_converted_and_verified(
    ldm: Tensors, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = gguf_files.write(tmp_path / "mine.gguf", ldm, "Q8_0")
    options = ConvertOptions(
        attention="original", components="unet", compiled=False, zip=False, base=str(tiny_checkpoint("sdxl"))
    )
    found = convert(path, tmp_path / "models", options)
    assert found is not None and next((tmp_path / "models").rglob("*unet.mlpackage")).is_dir()


def test_without_the_package_one_line_says_how_to_install_it(
    ldm: Tensors, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_files.write(tmp_path / "mine.gguf", ldm, "Q8_0")
    gguf_file._blocks.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        InstallationError, match=r"^GGUF files need the package gguf: pip install 'coreml-sd\[gguf\]'$"
    ):
        open_checkpoint(str(path), ConvertOptions(base=str(tiny_checkpoint("sdxl"))))


def test_what_is_missing_must_be_given(
    ldm: Tensors, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = gguf_files.write(tmp_path / "mine.gguf", ldm, "Q8_0")
    with pytest.raises(CheckpointError, match=r"has no vae and no text encoder: give them with --base$"):
        open_checkpoint(str(path))
    with pytest.raises(
        CheckpointError, match=r"^--vae .*is a GGUF file, which is read as a checkpoint's UNet only$"
    ):
        open_checkpoint(str(tiny_checkpoint("sdxl")), ConvertOptions(vae=str(path)))


def test_a_model_of_another_architecture(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.img_attn.qkv.weight": torch.ones(32, 32)}
    path = gguf_files.write(tmp_path / "flux.gguf", tensors, "Q8_0", "flux")
    with pytest.raises(CheckpointError, match=r"a GGUF file of architecture 'flux', without a UNet: expected"):
        open_checkpoint(str(path))


def header(
    *weights: tuple[str, tuple[int, ...], int, int],
    values: bytes = b"",
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A file's beginning, as bytes: name, dimensions (the fastest first), type and offset of each weight."""
    places = b""
    for name, shape, kind, offset in weights:
        places += struct.pack(
            f"<Q{len(name)}sI{len(shape)}QIQ", len(name), name.encode(), len(shape), *shape, kind, offset
        )
    return b"GGUF" + struct.pack("<I2Q", version, *(counts or (len(weights), 0))) + values + places


def pair(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack(f"<Q{len(name)}sI", len(name), name.encode(), kind) + value


PLAIN = (FIRST, (3, 3, 4, 32), 1, 0)
HOSTILE = {
    "nothing but the name": (b"GGUF", "it ends before its header does"),
    "many weights": (header(PLAIN, counts=(2**63, 0)), "it ends before its header does"),
    "many values": (header(PLAIN, counts=(1, 2**64 - 1)), "it ends before its header does"),
    "a long name": (b"GGUF" + struct.pack("<I2QQ", 3, 1, 0, 2**62), f"which claims {2**62} bytes"),
    "a long array": (
        header(PLAIN, values=pair("x", 9, struct.pack("<IQ", 0, 2**60)), counts=(1, 1)),
        f"which claims {2**60} bytes",
    ),
    "an array of many texts": (
        header(PLAIN, values=pair("x", 9, struct.pack("<IQ", 8, 2**60)), counts=(1, 1)),
        "it ends before its header does",
    ),
    "an array of arrays": (
        header(PLAIN, values=pair("x", 9, struct.pack("<IQ", 9, 1) * 1000), counts=(1, 1)),
        "an array of type 9",
    ),
    "a value of no type": (header(PLAIN, values=pair("x", 77, b""), counts=(1, 1)), "a value of unknown type 77"),
    "another version": (header(PLAIN, version=7), "GGUF of version 7, expected 2 or 3"),
    "the other byte order": (header(PLAIN, version=3 << 24), "GGUF of version"),
    "an odd alignment": (
        header(PLAIN, values=pair("general.alignment", 4, struct.pack("<I", 0)), counts=(1, 1)),
        "general.alignment 0, expected a power of two",
    ),
    "no dimensions": (header((FIRST, (), 1, 0)), "has 0 dimensions, expected 1 to 4"),
    "a thousand dimensions": (header((FIRST, (1,) * 1000, 1, 0)), "has 1000 dimensions"),
    "an empty weight": (header((FIRST, (4, 0), 1, 0)), "is empty"),
    "sizes that overflow": (header((FIRST, (2**32, 2**32), 1, 0)), "it ends before input_blocks"),
    "a weight beyond the end": (header((FIRST, (3, 3, 4, 32), 1, 2**40)), "it ends before input_blocks"),
    "an odd offset": (header((FIRST, (3, 3, 4, 32), 1, 7)), "does not lie at a multiple of 32"),
    "one name twice": (header(PLAIN, PLAIN) + bytes(4000), "two weights are called 'input_blocks"),
    "an unknown quantisation": (
        header((FIRST, (32, 32), 99, 0)),
        "weights of type 99, which the package gguf cannot",
    ),
    "one that is only for sums": (
        header((FIRST, (256, 32), 15, 0)),
        "weights of type 15, which the package gguf cannot",
    ),
    "rows that no block fits": (header((FIRST, (33, 32), 8, 0)), "has rows of 33, expected a multiple of 32"),
    "a shape of another size": (
        header(
            PLAIN,
            values=pair(f"comfy.gguf.orig_shape.{FIRST}", 9, struct.pack("<IQ2i", 5, 2, 7, 7)),
            counts=(1, 1),
        )
        + bytes(4000),
        r"of shape \(32, 4, 3, 3\) cannot have been of shape \(7, 7\)",
    ),
    "a name that is no text": (b"GGUF" + struct.pack("<I2QQ", 3, 1, 0, 2) + b"\xff\xfe" + bytes(64), "codec can't"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_files(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"x\.gguf: .*{message}") as caught:
        open_checkpoint(str(tmp_path / "x.gguf"))
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(ldm: Tensors, tmp_path: Path) -> None:
    data = gguf_files.write(tmp_path / "mine.gguf", ldm, "Q8_0").read_bytes()
    for part in range(1, 40):
        (tmp_path / "cut.gguf").write_bytes(data[: max(4, len(data) * part // 40 - 1)])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: it ends before"):
            gguf_file.read(tmp_path / "cut.gguf")
