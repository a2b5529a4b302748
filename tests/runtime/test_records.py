"""What is believed of a picture's record, and what is not. `test_generate.py` repeats pictures from theirs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion_runtime import generation, images
from diffusion_runtime import png_record as records
from diffusion_runtime.errors import InputError

NO_VALUE = ["a"]  # of no field's type
DAMAGES: list[dict[str, Any]] = [{field.name: NO_VALUE} for field in fields(records.Settings)]
DAMAGES += [{name: NO_VALUE} for name in (*records.LOADING, "models", "image_sha256")]
DAMAGES += [{"prompt": None}, {"seed": 1.5}, {"steps": True}, {"guidance_scale": "seven"}, {"long_prompt": "no"}]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_damaged_record_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    record = {"prompt": "a cat", "steps": 3, "seed": 1, "guidance_scale": 7, **damage}
    images.write_png(Image.new("RGB", (8, 8)), tmp_path / "p.png", record)
    with pytest.raises(InputError, match=f"record is damaged at {next(iter(damage))}: "):
        records.read(tmp_path / "p.png")


def test_whole_numbers_in_a_record_are_numbers(tmp_path: Path) -> None:
    images.write_png(Image.new("RGB", (8, 8)), tmp_path / "p.png", {"prompt": "", "guidance_scale": 7})
    assert records.read(tmp_path / "p.png").settings == records.Settings("", guidance_scale=7)


def test_records_of_whole_paths_are_understood(tmp_path: Path) -> None:
    start = str(tmp_path / "start.png")
    Image.new("RGB", (64, 64)).save(start)
    record = {"prompt": "", "models": str(tmp_path), "image": start, "tokenizer": str(tmp_path)}
    (tmp_path / "moved").mkdir()
    images.write_png(Image.new("RGB", (8, 8)), tmp_path / "moved" / "p.png", record)
    order = generation.order(None, {}, from_picture=tmp_path / "moved" / "p.png")
    assert order.inputs["image"] is not None and order.inputs["image"].size == (64, 64)
    assert (order.models, order.planned[0].settings.image) == (str(tmp_path), start)
    assert order.loading["tokenizer"] == str(tmp_path)
