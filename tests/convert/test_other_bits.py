"""Converting anew to other bits uses the 16-bit packages that are there, where they are what they would be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_convert import convert
from diffusion_convert.conversion.events import Event, Phase
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.families import AttentionKind

WHOLE = ConvertOptions(
    attention=(AttentionKind.ORIGINAL,), components=("text_encoder", "vae_encoder"), compiled=False
)
FEW_BITS = replace(WHOLE, nbits=6)
NETWORKS = (Phase.REFERENCE, Phase.LOAD, Phase.CONVERT, Phase.VERIFY)
"""Phases in which a network or a 16-bit package is made or run."""


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of our own, to change it."""
    return shutil.copytree(tiny_checkpoint("sd1"), tmp_path_factory.mktemp("source") / "sd1")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "models"
    convert(source, output, WHOLE)
    return output


def parts(source: Path, output: Path, options: ConvertOptions) -> tuple[dict[str, set[Phase]], tuple[str, ...]]:
    """Convert; what was done with each part, and the notes."""
    seen: dict[str, set[Phase]] = {}
    notes: list[str] = []

    def listen(event: Event) -> None:
        if event.part:
            seen.setdefault(event.part, set()).add(event.phase)
        if event.phase is Phase.NOTE:
            notes.append(event.text)

    convert(source, output, options, listen)
    return seen, tuple(notes)


def packages(output: Path) -> dict[str, bytes]:
    folder = output / "original" / "packages"
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.FILE_NAME]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def described(output: Path) -> Manifest:
    return manifest.read(output / "original" / "packages")


def test_fewer_bits_after_a_16_bit_run(whole: Path, source: Path, tmp_path: Path) -> None:
    """No network is run or converted again, and the models are those of a conversion in one go."""
    output = shutil.copytree(whole, tmp_path / "models")
    seen, notes = parts(source, output, FEW_BITS)
    assert seen == {"text_encoder": {Phase.PALETTIZE}}
    assert any("16-bit packages are used: text_encoder, vae_encoder" in note for note in notes)
    convert(source, tmp_path / "anew", FEW_BITS)
    assert packages(output) == packages(tmp_path / "anew")
    made, anew = described(output), described(tmp_path / "anew")
    for name, component in made.components.items():
        assert component.psnr_db == pytest.approx(anew.components[name].psnr_db, abs=0.01)
        assert component == anew.components[name].model_copy(update={"psnr_db": component.psnr_db})
    assert made.tools == anew.tools
    seen, notes = parts(source, output, WHOLE)
    assert seen.keys() == {"text_encoder"}, "the VAE has 16 bits in both"
    assert seen["text_encoder"].issuperset(NETWORKS)
    assert packages(output) == packages(whole)


@pytest.mark.parametrize("change", ["file", "source", "target", "verify"])
def test_what_is_not_the_same_is_made_anew(
    change: str, whole: Path, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output, options, unlike = shutil.copytree(whole, tmp_path / "models"), FEW_BITS, {"text_encoder", "vae_encoder"}
    if change == "file":
        name = described(output).components["text_encoder"].files[0]
        weights = output / "original" / "packages" / name / "Data/com.apple.CoreML/weights/weight.bin"
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        unlike = {"text_encoder"}
    elif change == "source":
        changed = source / "text_encoder" / "model.safetensors"
        before = changed.stat().st_mtime_ns
        request.addfinalizer(lambda: os.utime(changed, ns=(before, before)))
        os.utime(changed, ns=(0, 0))
    elif change == "target":
        options = replace(options, target="iOS17")
    else:
        convert(source, output, replace(WHOLE, verify=False))
    seen, _ = parts(source, output, options)
    assert {part for part, phases in seen.items() if phases.issuperset(NETWORKS)} == unlike
