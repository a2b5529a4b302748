"""Prompts to token numbers, those of transformers' CLIPTokenizer, with weights per token and a word on what was cut
off."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_runtime import strict_json
from diffusion_runtime.errors import InputError, PackageError, first_line
from diffusion_runtime.prompt import clip, emphasis
from diffusion_runtime.real_path import is_there

LENGTH = 77
VOCABULARY_FILES = ("vocab.json", "merges.txt")
FAST = "tokenizer.json"
_EMBEDDING = re.compile(r"(?<!\\)<[A-Za-z][^<>\s]*>")
_ESCAPED = re.compile(r"\\<(?=[A-Za-z])")
_SHOWN = 8
T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SETTINGS = (clip.CONFIG, clip.MAP, clip.ADDED)


@dataclass(frozen=True, slots=True)
class Tokens:
    """``ids`` and ``weights`` of shape (pieces, length); ``lost`` is the text that found no place, else ""."""

    ids: np.ndarray
    weights: np.ndarray
    lost: str = ""

    @property
    def is_weighted(self) -> bool:
        return bool((self.weights != 1.0).any())


@dataclass(frozen=True)
class Tokenizer:
    """``backend`` is a tokenizer of the tokenizers library, ``special`` its special tokens by transformers' names.
    T5's has no ``start`` of texts. ``length`` is what the text encoder takes, start and end included."""

    backend: Any
    special: Mapping[str, str]
    load_clip: Callable[[], Any]
    length: int = LENGTH
    start: bool = True

    @cached_property
    def clip(self) -> Any:
        """The same as a tokenizer of transformers, which is imported for it."""
        return self.load_clip()

    @cached_property
    def added(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary, special ones too."""
        decoder = self.backend.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(decoder.items())}

    @property
    def room(self) -> int:
        """How many tokens of a prompt a piece has place for."""
        return self.length - 1 - self.start

    def number(self, name: str) -> int:
        """Of a special token: "bos_token", "eos_token" or "pad_token"."""
        number: int = self.backend.token_to_id(self.special[name])
        return number

    def encode(self, prompt: str, pieces: int = 1) -> Tokens:
        """Up to ``pieces`` pieces of ``length`` tokens; pieces without text are those of an empty prompt."""
        ids: list[int] = []
        weights: list[float] = []
        for fragment in emphasis.parse(prompt):
            # T5 knows no textual inversions: to it, their names are letters, as in diffusers.
            known = self._all_vectors(self._checked(fragment.text)) if self.start else fragment.text
            text = _ESCAPED.sub("<", known)
            part = self.backend.encode(text, add_special_tokens=False).ids
            ids += part
            weights += [fragment.weight] * len(part)
        room = self.room
        lost = self._text(ids[room * pieces :]) if len(ids) > room * pieces else ""
        rows = [self._piece(ids[start : start + room]) for start in range(0, room * pieces, room)]
        counts = np.ones((pieces, self.length), np.float32)
        for row, start in zip(counts, range(0, room * pieces, room), strict=True):
            part_weights = weights[start : start + room]
            row[self.start : self.start + len(part_weights)] = part_weights
        return Tokens(np.array(rows, np.int64), counts, lost)

    def _checked(self, text: str) -> str:
        """``text``. Raises InputError for what is written as the name of a textual inversion, as in "a photo of
        <sks>", and is none of these models': its letters would be drawn as words, and nobody would know why."""
        for name in _EMBEDDING.findall(text):
            if name not in self.added and not self.added.keys() & set(self._words(name)):
                known = sorted(self.added.keys() - self.special.values())
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
        for token in dict.fromkeys(self._words(text)):
            if token in self.added and f"{token}_1" in self.added:
                vectors = takewhile(self.added.__contains__, (f"{token}_{number}" for number in count(1)))
                text = text.replace(token, " ".join([token, *vectors]))
        return text

    def _words(self, text: str) -> list[str]:
        words: list[str] = self.backend.encode(text, add_special_tokens=False).tokens
        return words

    def _text(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text.replace(clip.WORD_END, " ").strip() if self.start else text

    def _piece(self, ids: list[int]) -> list[int]:
        filled = [*([self.number("bos_token")] if self.start else []), *ids, self.number("eos_token")]
        return filled + [self.number("pad_token")] * (self.length - len(filled))


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
    settings = _read(folder, () if missing else VOCABULARY_FILES)
    configured = settings.keys() & {FAST, *SETTINGS[:2]}
    given = {"pad_token": pad_token} if pad_token and not configured else {}
    load_clip = partial(_of_transformers, folder, given)
    try:
        made = None if FAST in settings else clip.plain(folder, settings, given)
        made = made or _made(load_clip())
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise PackageError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from error
    needed = (made.special.get(name, "") for name in ("bos_token", "eos_token", "pad_token"))
    if None in map(made.backend.token_to_id, needed):
        raise PackageError(f"{folder / 'vocab.json'}: lacks the start, end or padding token of CLIP")
    return Tokenizer(made.backend, made.special, load_clip, length)


def _of_transformers(folder: Path, given: Mapping[str, str]) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **given)


def _made(of_transformers: Any) -> clip.Made:
    backend = of_transformers.backend_tokenizer
    backend.no_truncation()  # which a tokenizer.json may ask for; transformers does what each call says
    backend.no_padding()
    return clip.Made(backend, dict(of_transformers.special_tokens_map))


def load_t5(folder: Path, length: int) -> Tokenizer:
    """T5's tokenizer of a folder with tokenizer.json. Raises InputError where it is missing and PackageError where
    it is damaged."""
    if not is_there(folder / FAST, PackageError):
        raise InputError(f"{folder}: no {FAST}, which T5's text encoder needs: convert again, or leave T5 out")
    _read(folder, ())
    from transformers import PreTrainedTokenizerFast

    try:
        # By its own file alone: CLIP's vocabulary, which apps look for there, may lie beside it.
        t5 = PreTrainedTokenizerFast(tokenizer_file=str(folder / FAST), **T5_TOKENS)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise PackageError(f"{folder / FAST}: the tokenizer cannot be read: {first_line(error)}") from error
    made = _made(t5)
    return Tokenizer(made.backend, made.special, lambda: t5, length, start=False)


def _read(folder: Path, vocabulary_files: Sequence[str]) -> dict[str, Any]:
    """The settings' files' values by name. Raises PackageError for files that cannot be read or are of another
    kind."""
    settings = {
        name: strict_json.read(folder / name, PackageError, strict_json.MAX_VOCABULARY_BYTES)
        for name in (FAST, *SETTINGS)
        if is_there(folder / name, PackageError)
    }
    if not vocabulary_files:
        return settings
    path = folder / "vocab.json"
    vocabulary = strict_json.read_object(path, PackageError, strict_json.MAX_VOCABULARY_BYTES)
    try:
        (folder / "merges.txt").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PackageError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from error
    if not all(isinstance(number, int) for number in vocabulary.values()):
        raise PackageError(f"{path}: not a vocabulary: expected an object of token -> number")
    return settings
