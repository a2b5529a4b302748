"""Equal weights of several packages are clustered once, and the packages are as if each were alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_convert import convert
from diffusion_convert.export import placeholders
from diffusion_convert.options import ConvertOptions
from diffusion_convert.palettize import palette
from diffusion_convert.palettize.known import Known
from diffusion_convert.palettize.palettize_options import PER_GROUPED_CHANNEL, PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_package


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of weights whose elements were counted to look for a palette."""
    names: list[str] = []
    original = palette._histogram

    def counted(name: str, *how: Any) -> palette.Histogram:
        names.append(name)
        return original(name, *how)

    monkeypatch.setattr(palette, "_histogram", counted)
    return names


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".bin", ".mlmodel")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("iOS16", PalettizeOptions(6)),
        ("iOS18", PalettizeOptions(6)),
        ("iOS18", PalettizeOptions(8)),
        ("iOS18", PalettizeOptions(4, granularity=PER_GROUPED_CHANNEL, group_size=8)),
    ],
)
def test_equal_weights_have_the_palettes_of_the_first(
    target: str,
    options: PalettizeOptions,
    tiny_package: Callable[..., Path],
    tmp_path: Path,
    read: list[str],
) -> None:
    known = Known()
    first, second = tmp_path / "first.mlpackage", tmp_path / "second.mlpackage"
    palettize_package(tiny_package(target), first, options, known=known)
    made, before = len(read), files(first)
    assert made
    shutil.rmtree(first)  # as where a UNet is cut in two
    report = palettize_package(tiny_package(target), second, options, known=known)
    assert len(read) == made
    assert files(second) == before
    assert len(report.weights) == len(palettize_package(tiny_package(target), first, options).weights)
    anew = len(read)
    palettize_package(tiny_package(target), first, replace(options, bits=2), known=known)
    assert len(read) > anew, "other bits have other palettes"


def test_variants_and_sizes_are_clustered_once(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    monkeypatch.setattr(placeholders, "MIN_SIZE", 64)

    def bundle(name: str, attention: str, sizes: str) -> Path:
        few: dict[str, Any] = {"components": "unet", "nbits": 6, "verify": False, "compiled": False}
        options = ConvertOptions(attention.split(","), sizes=sizes.split(","), **few)
        return convert(tiny_checkpoint("sd1"), tmp_path / name, options).output

    four = bundle("four", "original,split_einsum", "64x64,96x64")
    of_four = len(read)
    one = bundle("one", "split_einsum", "96x64")
    assert of_four == len(read) - of_four
    name = "split_einsum/packages"
    alone, together = files(one / name), files(four / name / "96x64")
    assert len(alone) == 2, "a program and its weights"
    assert sorted(alone.values()) == sorted(together.values())
