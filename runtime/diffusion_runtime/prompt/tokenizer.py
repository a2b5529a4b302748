"""Prompts to token numbers: transformers' CLIPTokenizer, with weights per token and a word on what was cut off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_runtime import strict_json
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.prompt import emphasis
from diffusion_runtime.real_path import is_there

LENGTH = 77
VOCABULARY_FILES = ("vocab.json", "merges.txt")
FAST = "tokenizer.json"
_EMBEDDING = re.compile(r"(?<!\\)<[A-Za-z][^<>\s]*>")
_ESCAPED = re.compile(r"\\<(?=[A-Za-z])")
_SHOWN = 8
T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Tokens:
    """``ids`` and ``weights`` of shape (pieces, length); ``lost`` is the text that found no place, else ""."""

    ids: np.ndarray
    weights: np.ndarray
    lost: str = ""

    @property
    def is_weighted(self) -> bool:
        return bool((self.weights != 1.0).any())


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """``clip`` is a CLIPTokenizer, or T5's, which has no ``start`` of texts; ``length`` is what the text encoder
    takes, start and end included."""

    clip: Any
    length: int = LENGTH
    start: bool = True

    @property
    def room(self) -> int:
        """How many tokens of a prompt a piece has place for."""
        return self.length - 1 - self.start

    def encode(self, prompt: str, pieces: int = 1) -> Tokens:
        """Up to ``pieces`` pieces of ``length`` tokens; pieces without text are those of an empty prompt."""
        ids: list[int] = []
        weights: list[float] = []
        for fragment in emphasis.parse(prompt):
            # T5 knows no textual inversions: to it, their names are letters, as in diffusers.
            known = self._all_vectors(self._checked(fragment.text)) if self.start else fragment.text
            text = _ESCAPED.sub("<", known)
            part = self.clip(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += part
            weights += [fragment.weight] * len(part)
        room = self.room
        lost = self.clip.decode(ids[room * pieces :]) if len(ids) > room * pieces else ""
        rows = [self._piece(ids[start : start + room]) for start in range(0, room * pieces, room)]
        counts = np.ones((pieces, self.length), np.float32)
        for row, start in zip(counts, range(0, room * pieces, room), strict=True):
            part_weights = weights[start : start + room]
            row[self.start : self.start + len(part_weights)] = part_weights
        return Tokens(np.array(rows, np.int64), counts, lost)

    def _checked(self, text: str) -> str:
        """``text``. Raises InputError for what is written as the name of a textual inversion, as in "a photo of
        <sks>", and is none of these models': its letters would be drawn as words, and nobody would know why."""
        added = self.clip.added_tokens_encoder
        for name in _EMBEDDING.findall(text):
            if name not in added and not added.keys() & set(self.clip.tokenize(name)):
                special = set(self.clip.all_special_tokens)
                known = sorted(token for token in added if token not in special)
                shown = f"known are {', '.join(known[:_SHOWN])}" if known else "they know none"
                how = "--lora FILE" if name[1:6].lower() == "lora:" else f"--embedding FILE:{name}"
                raise InputError(
                    f"the prompt names {name}, an embedding that these models do not know ({shown}): convert with "
                    f"{how}, or write \\{name} for the text itself"
                )
        return text

    def _all_vectors(self, text: str) -> str:
        """A textual inversion of several vectors is the tokens ``<name>``, ``<name>_1``, …: the prompt names the
        first alone, and diffusers' pipelines put the others after it, wherever the prompt has its letters."""
        added = self.clip.added_tokens_encoder
        for token in dict.fromkeys(self.clip.tokenize(text)):
            if token in added and f"{token}_1" in added:
                vectors = takewhile(added.__contains__, (f"{token}_{number}" for number in count(1)))
                text = text.replace(token, " ".join([token, *vectors]))
        return text

    def _piece(self, ids: list[int]) -> list[int]:
        filled = [*([self.clip.bos_token_id] if self.start else []), *ids, self.clip.eos_token_id]
        return filled + [self.clip.pad_token_id] * (self.length - len(filled))


def load(folder: Path, length: int = LENGTH, pad_token: str | None = None) -> Tokenizer:
    """The tokenizer of a folder with vocab.json and merges.txt, or tokenizer.json; settings and added tokens come
    from the files next to them, as transformers reads them.

    ``length``: tokens of the text encoder. ``pad_token`` is used where no file says what pads. Raises InputError
    where files are missing and PackageError where they are damaged."""
    missing = [name for name in VOCABULARY_FILES if not is_there(folder / name, PackageError)]
    if missing and not is_there(folder / FAST, PackageError):
        raise InputError(
            f"{folder}: no {' and no '.join(missing)}: name the tokenizer's folder with --tokenizer "
            "(the checkpoint's `tokenizer` folder has both files)"
        )
    _check(folder, () if missing else VOCABULARY_FILES)
    from transformers import CLIPTokenizer

    configured = any(is_there(folder / name, PackageError) for name in (FAST, *SETTINGS[:2]))
    extra = {"pad_token": pad_token} if pad_token and not configured else {}
    try:
        clip = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **extra)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise PackageError(f"{folder}: the tokenizer cannot be read: {_first_line(error)}") from error
    if None in (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id):
        raise PackageError(f"{folder / 'vocab.json'}: lacks the start, end or padding token of CLIP")
    return Tokenizer(clip, length)


def load_t5(folder: Path, length: int) -> Tokenizer:
    """T5's tokenizer of a folder with tokenizer.json. Raises InputError where it is missing and PackageError where
    it is damaged."""
    if not is_there(folder / FAST, PackageError):
        raise InputError(f"{folder}: no {FAST}, which T5's text encoder needs: convert again, or leave T5 out")
    _check(folder, ())
    from transformers import PreTrainedTokenizerFast

    try:
        # By its own file alone: CLIP's vocabulary, which apps look for there, may lie beside it.
        t5 = PreTrainedTokenizerFast(tokenizer_file=str(folder / FAST), **T5_TOKENS)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise PackageError(f"{folder / FAST}: the tokenizer cannot be read: {_first_line(error)}") from error
    return Tokenizer(t5, length, start=False)


def _check(folder: Path, slow: Sequence[str]) -> None:
    """Raise PackageError for files that cannot be read or are of another kind. ``slow``: the vocabulary files."""
    for name in (FAST, *SETTINGS):
        if is_there(folder / name, PackageError):
            strict_json.read(folder / name, PackageError, strict_json.MAX_VOCABULARY_BYTES)
    if not slow:
        return
    path = folder / "vocab.json"
    vocabulary = strict_json.read_object(path, PackageError, strict_json.MAX_VOCABULARY_BYTES)
    try:
        (folder / "merges.txt").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PackageError(f"{folder}: the tokenizer cannot be read: {_first_line(error)}") from error
    if not all(isinstance(number, int) for number in vocabulary.values()):
        raise PackageError(f"{path}: not a vocabulary: expected an object of token -> number")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
