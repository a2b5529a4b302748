"""Families are told apart by configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoints
from diffusion_convert.checkpoint.family import default_size, detect, refuse_other_kinds
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES


@pytest.mark.parametrize("name", tiny_checkpoints.FAMILIES)
def test_every_family_is_detected(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    assert open_checkpoint(str(tiny_checkpoint(name))).family == name.removesuffix("-odd")


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert {name.removesuffix("-odd") for name in tiny_checkpoints.FAMILIES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("unet", "expected"),
    [
        ({"in_channels": 8}, "8 input channels"),
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
    assert open_checkpoint(str(tiny_checkpoint("sd2-base")), family="sd2-v").family == "sd2-v"
    with pytest.raises(InputError, match="sd1-inpainting"):
        open_checkpoint(str(tiny_checkpoint("sd1")), family="sd9")
    with pytest.raises(InputError, match=r"'sd2-depth' does not fit .* 4 input channels: expected sd1 or sd2-base"):
        open_checkpoint(str(tiny_checkpoint("sd1")), family="sd2-depth")


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
