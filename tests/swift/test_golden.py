"""The golden values of the Swift tests are what the installed libraries give."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from swift import golden, golden_pictures, golden_random, golden_schedulers, golden_tokens


def test_tokens_are_those_of_the_installed_transformers() -> None:
    assert _written("tokens.json") == json.loads(json.dumps(golden_tokens.values()))


def test_random_numbers_are_those_of_the_installed_libraries() -> None:
    """To a few units in the last place: torch's last bits are those of x86 with AVX2."""
    for written, now in zip(_written("random.json"), golden_random.values(), strict=True):
        assert {**written, "bits": None} == {**now, "bits": None}
        found, expected = (np.array(case["bits"], "<u4").view("<f4") for case in (now, written))
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_schedulers_are_those_of_the_installed_diffusers() -> None:
    for written, now in zip(_written("schedulers.json"), golden_schedulers.values(), strict=True):
        assert {**written, "values": None} == {**json.loads(json.dumps(now)), "values": None}
        found, expected = (np.frombuffer(base64.b64decode(case["values"]), "<f4") for case in (now, written))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_pictures_are_those_of_the_installed_pillow() -> None:
    written, now = _written("pictures.json"), json.loads(json.dumps(golden_pictures.values()))
    for part in ("files", "resized", "clips"):
        assert written[part] == now[part]
    for depth, again in zip(written["depths"], now["depths"], strict=True):
        found, expected = (np.frombuffer(base64.b64decode(case["small"]), "<f4") for case in (again, depth))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def _written(name: str) -> Any:
    return json.loads((golden.FOLDER / name).read_text(encoding="utf-8"))
