"""Bits chosen by weight while converting: those that `palettize` chooses, checked and on record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_convert import Conversion, ConvertOptions, convert
from diffusion_convert.inspect import palettized_weights
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.recipe import Recipe, average_bits, mix, save_recipe
from diffusion_convert.palettize.select import palettizable
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.package import open_package

Source = Callable[[str], Path]
UNET: dict[str, Any] = {"attention": "original", "components": "unet", "compiled": False}
CONV_IN = "unet_conv_in_weight_to_fp16"


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Source, build_once: Callable[..., Path]) -> Path:
    """The tiny UNet with 16-bit weights, as `convert` makes it."""
    options = ConvertOptions(**UNET)
    models = build_once("plain-unet", lambda to: convert(tiny_checkpoint("sd1"), to / "models", options))
    return unet_of(models / "models")


def unet_of(models: Path) -> Path:
    return models / "original" / "packages" / "Stable_Diffusion_version_sd1_unet.mlpackage"


def bits_of(made: Conversion, component: str = "unet") -> dict[str, int]:
    found = made.variants["original"].components[component].palettization
    return found.bits_by_weight if found is not None else {}


def write_recipe(path: Path, bits: dict[str, int]) -> Path:
    save_recipe(Recipe(package="other.mlpackage", sha256="0" * 64, average_bits=4.0, bits=bits), path)
    return path


def test_target_bits_are_chosen_as_palettize_chooses_them(
    plain: Path, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    options = ConvertOptions(
        attention="original", components=("text_encoder", "unet", "vae_decoder"), target_bits=4.5
    )
    made = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    mixed = mix(plain, PalettizeOptions(), 4.5)
    expected = mixed.options.bits_by_weight
    assert expected is not None
    assert bits_of(made) == expected
    assert len(set(expected.values())) > 1
    found = made.variants["original"].components
    unet, encoder, decoder = (found[name] for name in ("unet", "text_encoder", "vae_decoder"))
    assert unet.palettization is not None
    assert 4.3 < unet.palettization.nbits == round(average_bits(mixed.damage, expected), 4) <= 4.5
    assert len(set(bits_of(made, "text_encoder").values())) > 1
    assert encoder.palettization is not None
    assert decoder.palettization is None
    assert set(palettized_weights(open_package(unet_of(tmp_path / "models")).model.function)) == set(
        expected.values()
    )
    assert [path.name for path in (tmp_path / "models").glob("*.zip")] == [
        "coreml-sd1-palettized_original_compiled.zip"
    ]
    assert convert(tiny_checkpoint("sd1"), tmp_path / "models", options).unchanged


def test_a_recipe_is_for_the_weights_that_it_names(plain: Path, tiny_checkpoint: Source, tmp_path: Path) -> None:
    names = list(palettizable(open_package(plain)))
    recipe = write_recipe(tmp_path / "recipe.json", {names[0]: 4, names[1]: 8, "elsewhere": 6})
    options = ConvertOptions(**UNET | {"components": ("text_encoder", "unet")}, recipe=recipe)
    made = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    assert bits_of(made) == {names[0]: 4, names[1]: 8}
    assert bits_of(made, "text_encoder") == {}
    assert made.notes == (f"{recipe}: has no use for elsewhere",)
    widths = palettized_weights(open_package(unet_of(tmp_path / "models")).model.function)
    assert sorted(widths) == [4, 8]
    assert convert(tiny_checkpoint("sd1"), tmp_path / "models", options).unchanged
    write_recipe(recipe, {names[0]: 6})
    again = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    assert not again.unchanged
    assert bits_of(again) == {names[0]: 6}


def test_a_recipe_that_matches_no_weight(tiny_checkpoint: Source, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", {"elsewhere": 6})
    with pytest.raises(InputError, match=r"names none of the weights .* but elsewhere; it was made for other\.mlp"):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", ConvertOptions(**UNET, recipe=recipe))
    assert not (tmp_path / "models" / "original").exists()


def test_nbits_for_goes_before_target_bits(tiny_checkpoint: Source, tmp_path: Path) -> None:
    options = ConvertOptions(
        attention=AttentionKind.ORIGINAL,
        components=("text_encoder", "unet"),
        compiled=False,
        target_bits=6,
        nbits_for={"unet": 8},
    )
    made = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    assert set(bits_of(made).values()) == {8}
    assert made.variants["original"].components["text_encoder"].palettization is not None


def test_a_stopped_conversion_keeps_what_was_chosen(tiny_checkpoint: Source, tmp_path: Path) -> None:
    options = ConvertOptions(**UNET | {"components": ("text_encoder", "unet")}, target_bits=6)

    def stop(event: Any) -> None:
        if event.part.startswith("unet"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint("sd1"), tmp_path / "models", options, stop)
    parts = set()
    made = convert(tiny_checkpoint("sd1"), tmp_path / "models", options, lambda event: parts.add(event.part))
    assert parts == {"", "unet-original"}
    assert bits_of(made, "text_encoder") != {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 6, "target_bits": 4.5}, "--nbits, --target-bits and --recipe exclude each other"),
        ({"nbits": 6, "recipe": "a.json"}, "--nbits, --target-bits and --recipe exclude each other"),
        ({"target_bits": 4.5, "recipe": "a.json"}, "--nbits, --target-bits and --recipe exclude each other"),
        ({"target_bits": 0.5}, "--target-bits 0.5: expected 1 to 8"),
        ({"target_bits": 8.5}, "--target-bits 8.5: expected 1 to 8"),
        ({"target_bits": float("nan")}, "--target-bits nan: expected 1 to 8"),
        ({"target_bits": "4"}, "target_bits '4': expected a number"),
        ({"target_bits": True}, "target_bits True: expected a number"),
        ({"recipe": 4}, "recipe 4: expected a path"),
        ({"recipe": "a\0b"}, "--recipe 'a\\x00b': no path"),
        ({"recipe": "nowhere.json"}, "nowhere.json"),
        ({"nbits": 6, "components": "vae_decoder"}, "--nbits 6: nothing that is converted follows it"),
        (
            {"nbits": 6, "nbits_for": {"unet": 4}, "components": "unet"},
            "--nbits 6: nothing that is converted follows",
        ),
        ({"target_bits": 4, "components": "vae_decoder"}, "--target-bits 4: nothing that is converted follows it"),
        (
            {"target_bits": 4, "nbits_for": {"unet": 6}, "components": "unet"},
            "nothing that is converted follows it",
        ),
    ],
)
def test_misuse(options: dict[str, Any], message: str, tiny_checkpoint: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        convert(tiny_checkpoint("sd1"), tmp_path / "models", ConvertOptions(**options))
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_recipe(tiny_checkpoint: Source, tmp_path: Path) -> None:
    for text in ("{", "[]", json.dumps({"bits": {CONV_IN: 6}})):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(InputError, match=r"recipe\.json"):
            convert(tiny_checkpoint("sd1"), tmp_path / "m", ConvertOptions(recipe=tmp_path / "recipe.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
