"""Sample files that are too large for the repository: they lie beside it, in ``../shared/data``, or where the
variable ``COREML_SD_SHARED`` says. Tests that need them are skipped where they are not, and say so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
SHARED = Path(os.environ.get("COREML_SD_SHARED") or BESIDE)
PAIRS = tuple(sorted(path for path in (SHARED / "mlmodelc-pairs").glob("*") if path.is_dir()))
"""Folders that hold a package and the same model as Apple's compiler makes it."""
CLIP_TOKENIZER = SHARED / "clip-tokenizer"
"""CLIP's vocab.json and merges.txt as published."""

needs_pairs = pytest.mark.skipif(
    not PAIRS, reason=f"no models of Apple's compiler in {SHARED}: set COREML_SD_SHARED to a folder that has them"
)
needs_clip_tokenizer = pytest.mark.skipif(
    not CLIP_TOKENIZER.is_dir(), reason=f"no {CLIP_TOKENIZER}: set COREML_SD_SHARED to a folder that has it"
)
