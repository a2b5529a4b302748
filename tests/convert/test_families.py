"""Families are told apart by configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoints
from diffusion_convert import ConvertOptions
from diffusion_convert.checkpoint.family import default_size, detect, is_untrained, refuse_other_kinds
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.conversion.plan import make_plan
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES, UNET


@pytest.mark.parametrize("name", tiny_checkpoints.FAMILIES)
def test_every_family_is_detected(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    assert open_checkpoint(str(tiny_checkpoint(name))).family == name.removesuffix("-odd")


def test_every_family_has_a_tiny_checkpoint() -> None:
    known = {name.removesuffix("-odd") for name in tiny_checkpoints.FAMILIES}
    assert known == {name for name, family in FAMILIES.items() if family.denoiser is UNET}


@pytest.mark.parametrize(
    ("unet", "expected"),
    [
        ({"in_channels": 6}, "6 input channels"),
        ({"in_channels": 4, "num_class_embeds": 1000}, "class embeddings"),
        ({"in_channels": 4, "class_embed_type": "projection"}, "class embeddings"),
    ],
)
def test_unknown_ones_are_refused_with_what_was_seen(unet: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected) as raised:
        detect(unet, {}, "somewhere", ("text_encoder",))
    assert all(name in str(raised.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("addition_embed_type", "text_image", "of another kind than Stable Diffusion XL"),
        ("encoder_hid_dim_type", "ip_image_proj", "other encoders"),
    ],
)
def test_inputs_that_no_family_has_are_refused(key: str, value: object, expected: str) -> None:
    refuse_other_kinds({"in_channels": 4, key: None}, "somewhere")
    with pytest.raises(CheckpointError, match=expected) as raised:
        refuse_other_kinds({"in_channels": 4, key: value}, "somewhere")
    assert all(name in str(raised.value) for name in FAMILIES)


def test_family_can_be_named(tiny_checkpoint: Callable[[str], Path]) -> None:
    assert open_checkpoint(str(tiny_checkpoint("sd2-base")), ConvertOptions(family="sd2-v")).family == "sd2-v"
    with pytest.raises(InputError, match="sd1-inpainting"):
        open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(family="sd9"))
    with pytest.raises(InputError, match=r"'sd2-depth' does not fit .* 4 input channels: expected sd1 or sd2-base"):
        open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(family="sd2-depth"))


@pytest.mark.parametrize(
    ("unet", "size"),
    [
        ({"sample_size": 64, "_diffusers_version": "0.6.0"}, (512, 512)),
        ({"sample_size": 32, "_diffusers_version": "0.6.0"}, (512, 512)),
        ({"sample_size": 32, "_diffusers_version": "0.10.0.dev0"}, (256, 256)),
        ({"sample_size": 96}, (768, 768)),
        ({"sample_size": [64, 96]}, (512, 768)),
        ({}, (512, 512)),
    ],
)
def test_default_size(unet: dict[str, Any], size: tuple[int, int]) -> None:
    assert default_size(unet, {"block_out_channels": [1, 2, 3, 4]}) == size


@pytest.mark.parametrize(
    ("trained", "size", "untrained"),
    [
        (512, (512, 512), False),
        (512, (768, 512), False),
        (512, (640, 448), False),
        (512, (1024, 1024), True),
        (512, (256, 256), True),
        (768, (768, 768), False),
        (768, (512, 512), True),
        (1024, (512, 2048), False),
        (1024, (832, 1216), False),
        (1024, (1536, 640), False),
        (1024, (512, 512), True),
        (1024, (2048, 2048), True),
        (1024, (448, 2304), True),
    ],
)
def test_sizes_that_a_model_was_not_trained_for(trained: int, size: tuple[int, int], untrained: bool) -> None:
    assert is_untrained(size, (trained, trained)) == untrained


def test_such_a_size_is_noted(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    noted = {
        side: [note for note in make_plan(checkpoint, options).notes if "trained for" in note]
        for side in (64, 128)
        for options in (ConvertOptions(attention="original", height=side, width=side),)
    }
    assert noted[64] == []
    assert noted[128] == [
        "128x128 pixels (width x height): sd1 was trained for about the pixels of 64x64; at other sizes such "
        "models repeat themselves or lose detail"
    ]
