"""Writes the golden values that the Swift tests compare with: `PYTHONPATH=tests python -m swift.golden`.

They are committed, so that the Swift package is tested without Python; `test_golden.py` fails where they are not
what the installed libraries give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from swift import golden_pictures, golden_random, golden_schedulers, golden_tokens

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "swift_bridge" / "Tests" / "DiffusionBridgeTests" / "Golden"
WRITERS: Mapping[str, Callable[[], Any]] = {
    "pictures.json": golden_pictures.values,
    "random.json": golden_random.values,
    "schedulers.json": golden_schedulers.values,
    "tokens.json": golden_tokens.values,
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, values in WRITERS.items():
        text = json.dumps(values(), ensure_ascii=True, separators=(",", ":"))
        (FOLDER / name).write_text(text + "\n", encoding="utf-8")
        print(f"{FOLDER / name}: {len(text)} bytes")


if __name__ == "__main__":
    main()
