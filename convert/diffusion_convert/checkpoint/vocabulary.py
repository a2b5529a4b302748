"""vocab.json and merges.txt, which apps read, from a tokenizer of either kind: slow (the same files) or fast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError
from diffusion_runtime.prompt.tokenizer import FILES as VOCABULARY

_HEADER = "#version: 0.2"


def check_vocabulary(files: Mapping[str, Path]) -> None:
    """Raises CheckpointError where `write_vocabulary` would."""
    if not files.keys() >= set(VOCABULARY):
        _from_fast(files)


def write_vocabulary(files: Mapping[str, Path], target: Path) -> None:
    """Write vocab.json and merges.txt to the folder ``target``.

    ``files`` maps a tokenizer's file names to where they are: vocab.json and merges.txt are copied as they are,
    else both are taken from tokenizer.json. Raises CheckpointError where neither is there or of another kind.
    """
    if files.keys() >= set(VOCABULARY):
        for name in VOCABULARY:
            shutil.copyfile(files[name], target / name)
        return
    vocabulary, merges = _from_fast(files)
    text = json.dumps(dict(sorted(vocabulary.items(), key=lambda item: item[1])), ensure_ascii=False)
    (target / "vocab.json").write_text(text, encoding="utf-8")
    (target / "merges.txt").write_text("\n".join([_HEADER, *merges]) + "\n", encoding="utf-8")


def _from_fast(files: Mapping[str, Path]) -> tuple[dict[str, int], list[str]]:
    """The vocabulary and the merges of a fast tokenizer."""
    if "tokenizer.json" not in files:
        raise CheckpointError(
            "the tokenizer has neither vocab.json and merges.txt nor tokenizer.json "
            f"(found: {', '.join(sorted(files)) or 'nothing'})"
        )
    path = files["tokenizer.json"]
    data: Any = strict_json.read(path, CheckpointError, strict_json.MAX_VOCABULARY_BYTES)
    try:
        model = data["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        vocabulary = {str(token): int(number) for token, number in model["vocab"].items()}
        vocabulary |= {str(token["content"]): int(token["id"]) for token in data.get("added_tokens", ())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the file of a byte-pair tokenizer: {error!r}") from error
    return vocabulary, merges
