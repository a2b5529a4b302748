"""What options do to the result, and what is said of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_convert import convert
from diffusion_convert.components import table
from diffusion_convert.option_values import Lora, parse_choice, parse_lora, parse_nbits
from diffusion_convert.options import ConvertOptions, Precision
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import PALETTE_BITS, TARGETS, AttentionKind
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.picture_size import Size

Source = Callable[[str], Path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "macOS12"}, "unknown target 'macOS12': expected one of " + ", ".join(TARGETS)),
        ({"nbits": 3, "target": "macOS14"}, "nbits 3: needs --target macOS15"),
        ({"nbits_for": {"unet": 3}, "target": "iOS16"}, "unet 3: needs --target macOS15"),
        ({"nbits": 5}, "nbits 5: expected one of " + ", ".join(map(str, PALETTE_BITS))),
        ({"batch_size": 4}, "batch size 4: expected 2"),
        ({"height": 512}, "--height and --width belong together"),
        ({"attention": (AttentionKind.ORIGINAL,) * 2}, "--attention original is given twice: give it once"),
        ({"attention": "original,fast"}, "unknown attention 'fast': expected one of original, split_einsum"),
        ({"attention": 1}, "attention 1: expected one value or several"),
        ({"precision": "half"}, "unknown precision 'half': expected one of auto, float16, float32"),
        ({"nbits": "6"}, "nbits '6': expected a whole number"),
        ({"nbits": True}, "nbits True: expected a whole number"),
        ({"nbits_for": "unet=6"}, "nbits_for 'unet=6': expected a mapping"),
        ({"nbits_for": {"unet": 6.0}}, "nbits_for unet 6.0: expected a whole number"),
        ({"components": (1,)}, "components 1: expected names of components"),
        ({"loras": (1,)}, "LoRA path 1: expected a path"),
        ({"vae": 1}, "vae 1: expected a path or Hub id"),
        ({"height": "512", "width": 512}, "height '512': expected a whole number"),
        ({"batch_size": "2"}, "batch_size '2': expected a whole number"),
        ({"target": 15}, "target 15: expected a text"),
        ({"zip": "no"}, "zip 'no': expected True or False"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        ConvertOptions(**options)
    assert message in str(raised.value)


def test_texts_and_single_values_become_what_the_fields_are() -> None:
    """A text compared with an enum's member would be another precision, silently."""
    given: dict[str, Any] = {
        "attention": "original",
        "precision": "float32",
        "components": "unet, vae_decoder",
        "loras": ("style.safetensors:0.8", Path("other.safetensors")),
        "vae": Path("vae"),
    }
    assert ConvertOptions(**given) == ConvertOptions(
        attention=(AttentionKind.ORIGINAL,),
        precision=Precision.FLOAT32,
        components=("unet", "vae_decoder"),
        loras=(Lora(Path("style.safetensors"), 0.8), Lora(Path("other.safetensors"))),
        vae="vae",
    )
    assert ConvertOptions("original,split_einsum", sizes="64x64, 96x64").sizes == (Size(64, 64), Size(96, 64))
    several: dict[str, Any] = {"attention": ["original", AttentionKind.SPLIT_EINSUM], "loras": Path("a")}
    assert ConvertOptions(**several).attention == (AttentionKind.ORIGINAL, AttentionKind.SPLIT_EINSUM)
    assert ConvertOptions(**several).loras == (Lora(Path("a")),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"height": 500, "width": 512},
            "--height 500: expected a multiple of 8 of at least 64; near it are 496 and 504",
        ),
        ({"height": 512, "width": 8}, "--width 8: expected a multiple of 8 of at least 64; near it is 64"),
        ({"components": ("unett",)}, "unknown component 'unett': expected one of " + ", ".join(table())),
        ({"components": ("depth_estimator",)}, "sd1 has no depth_estimator; it has text_encoder, unet"),
        ({"family": "sd7"}, "unknown family 'sd7': expected one of sd1, "),
        ({"revision": "main"}, "--revision main"),
        ({"nbits_for": {"unett": 6}}, "--nbits-for: unett is not converted; what is: text_encoder, unet"),
        (
            {"components": ("text_encoder",), "chunk_unet": True},
            "--chunk-unet: unet is not converted; what is: text_encoder",
        ),
    ],
)
def test_options_that_do_not_fit_the_checkpoint(
    options: dict[str, Any], message: str, tiny_checkpoint: Source, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        convert(tiny_checkpoint("sd1"), tmp_path / "models", ConvertOptions(**options))
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_one_row_and_a_newer_target(tiny_checkpoint: Source, tmp_path: Path) -> None:
    """9 x 13 latents cannot be halved evenly: the networks take any multiple of the VAE's factor."""
    options = ConvertOptions(
        attention=(AttentionKind.SPLIT_EINSUM_V2,),
        components=("unet", "vae_decoder"),
        height=72,
        width=104,
        batch_size=1,
        target="iOS18",
        compiled=False,
    )
    made = convert(tiny_checkpoint("sd1-odd"), tmp_path / "models", options).variants["split_einsum_v2"]
    assert (made.height, made.width, made.batch_size, made.target) == (72, 104, 1, "iOS18")
    assert made.components["unet"].inputs[0].shape == (1, 4, 9, 13)
    assert made.components["vae_decoder"].outputs[0].shape == (1, 3, 72, 104)
    for name, component in made.components.items():
        assert min(component.psnr_db.values()) >= table()[name].min_psnr_db
        package = open_package(tmp_path / "models" / "split_einsum_v2" / "packages" / component.files[0])
        assert package.model.specification_version == 9


def test_palettized_and_cut_in_two(tiny_checkpoint: Source, tmp_path: Path) -> None:
    options = ConvertOptions(
        attention=(AttentionKind.ORIGINAL,),
        components=("unet", "vae_encoder"),
        nbits=6,
        nbits_for={"vae_encoder": 8},
        chunk_unet=True,
        compiled=False,
    )
    result = convert(tiny_checkpoint("sd1"), tmp_path / "models", options)
    unet, encoder = (result.variants["original"].components[name] for name in ("unet", "vae_encoder"))
    prefix = "Stable_Diffusion_version_sd1_unet"
    assert unet.files == (f"{prefix}_chunk1.mlpackage", f"{prefix}_chunk2.mlpackage")
    packages = tmp_path / "models" / "original" / "packages"
    assert {path.name for path in packages.glob("*.mlpackage")} == {*unet.files, *encoder.files}
    assert unet.palettization is not None
    assert unet.palettization.nbits == 6
    assert encoder.palettization is not None
    assert encoder.palettization.nbits == 8
    assert [tensor.name for tensor in unet.inputs] == ["sample", "timestep", "encoder_hidden_states"]


def test_specifications_are_coremltools_own() -> None:
    targets = import_coremltools().target
    assert {name: int(targets[name].value) for name in TARGETS} == dict(TARGETS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", Lora(Path("style.safetensors"))),
        ("style.safetensors:0.8", Lora(Path("style.safetensors"), 0.8)),
        ("C:/style.safetensors:-1", Lora(Path("C:/style.safetensors"), -1.0)),
    ],
)
def test_lora(text: str, expected: Lora) -> None:
    assert parse_lora(text) == expected


def test_texts_that_mean_nothing() -> None:
    with pytest.raises(InputError, match="PATH:WEIGHT"):
        parse_lora("style:much")
    for text in ("unet", "=6", "unet=", "unet=six", "unet=-6", "unet=\N{SUPERSCRIPT TWO}"):
        with pytest.raises(InputError, match="COMPONENT=BITS"):
            parse_nbits([text])
    assert parse_nbits(["unet=6", "text_encoder=8"]) == {"unet": 6, "text_encoder": 8}
    with pytest.raises(InputError, match="expected one of auto, float16, float32"):
        parse_choice(Precision, "precision", "half")
