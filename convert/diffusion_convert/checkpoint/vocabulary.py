"""vocab.json, merges.txt and settings, which apps and transformers read, from a tokenizer of either kind: slow (the
same files) or fast (tokenizer.json, which may be all that there is)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_runtime import strict_json
from diffusion_runtime.errors import CheckpointError, InputError, InstallationError
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES
from diffusion_runtime.scratch import scratch

FAST = "tokenizer.json"
ADDED = "added_tokens.json"
CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (*VOCABULARY_FILES, FAST, CONFIG, "special_tokens_map.json", ADDED)
"""What a tokenizer's folder may hold that matters here."""

SENTENCEPIECE = "spiece.model"
T5_FILES = (FAST, CONFIG, "special_tokens_map.json", ADDED, SENTENCEPIECE)
"""The same of T5's."""

_HEADER = "#version: 0.2"


def check_vocabulary(files: Mapping[str, Path]) -> None:
    """Raises CheckpointError where `write_vocabulary` would."""
    if FAST in files:
        _load(files)
    elif not files.keys() >= set(VOCABULARY_FILES):
        raise CheckpointError(
            "the tokenizer has neither vocab.json and merges.txt nor tokenizer.json "
            f"(found: {', '.join(sorted(files)) or 'nothing'})"
        )


def unknown_tokens(files: Mapping[str, Path], size: int) -> tuple[str, ...]:
    """The tokens of a tokenizer with numbers that a text encoder with an embedding for ``size`` tokens does not
    have: transformers fails at prompts with them. Raises CheckpointError where that is every prompt."""
    clip = _load(files)
    needed = {clip.bos_token, clip.eos_token, clip.pad_token}
    beyond = {token: number for token, number in clip.get_vocab().items() if number >= size}
    if lost := sorted(beyond.keys() & needed):
        raise CheckpointError(
            f"the tokenizer gives {lost[0]} the number {beyond[lost[0]]}, but the text encoder has an embedding "
            f"for {size} tokens only: not of one model"
        )
    return tuple(sorted(beyond, key=lambda token: (beyond[token], token)))


def numbers_of(files: Mapping[str, Path], added: Sequence[str]) -> tuple[int, ...]:
    """The numbers that a tokenizer gives to tokens that are added to it one after another, as diffusers adds those
    of a textual inversion. Raises InputError for a token that it has already."""
    clip = _load(files)
    known = clip.get_vocab()
    if known_already := [token for token in added if token in known]:
        raise InputError(
            f"--embedding: the tokenizer has a token {known_already[0]!r} already: name another, "
            "--embedding FILE:TOKEN"
        )
    for token in added:
        clip.add_tokens(token)
    return tuple(clip.convert_tokens_to_ids(list(added)))


def write_vocabulary(files: Mapping[str, Path], target: Path, added: Sequence[str] = ()) -> None:
    """Write a tokenizer to the folder ``target`` as vocab.json, merges.txt and what goes with them.

    ``files`` maps a tokenizer's file names to where they are. Without tokenizer.json they are copied as they are.
    With it, transformers reads them first: tokenizer.json wins over vocab.json, and tokens added to a vocabulary
    may stand in it alone. What is written then says the same as what transformers has read: added tokens stand in
    added_tokens.json and, with how they match, in tokenizer_config.json. So it is with tokens that are ``added``.
    Raises CheckpointError for files that are
    missing, damaged or of another kind of tokenizer.
    """
    check_vocabulary(files)
    for name in TOKENIZER_FILES:
        if name in files and name != FAST:
            shutil.copyfile(files[name], target / name)
    if FAST in files or added:
        _write_read(files, target, added)


def _write_read(files: Mapping[str, Path], target: Path, more: Sequence[str]) -> None:
    clip = _load(files)
    for token in more:
        clip.add_tokens(token)
    model = json.loads(clip.backend_tokenizer.to_str())["model"]
    added = dict(sorted(clip.added_tokens_decoder.items()))
    special = {name: str(getattr(clip, name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    vocabulary = model["vocab"] | {str(t): number for number, t in added.items() if str(t) in special.values()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    extra = {str(token): number for number, token in added.items() if str(token) not in vocabulary}
    _write_json(target / "vocab.json", dict(sorted(vocabulary.items(), key=lambda item: int(item[1]))))
    (target / "merges.txt").write_text("\n".join([_HEADER, *merges]) + "\n", encoding="utf-8")
    (target / ADDED).unlink(missing_ok=True)
    if extra:
        _write_json(target / ADDED, extra)
    settings = strict_json.read_object(files[CONFIG], CheckpointError) if CONFIG in files else {}
    _write_json(
        target / CONFIG,
        {
            **settings,
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "added_tokens_decoder": {str(number): _attributes(token) for number, token in added.items()},
        },
    )


def check_t5(files: Mapping[str, Path], size: int) -> None:
    """Raises CheckpointError for files that are no tokenizer of T5's, or one whose numbers an encoder with an
    embedding for ``size`` tokens does not have."""
    if not files.keys() & {FAST, SENTENCEPIECE}:
        raise CheckpointError(
            f"T5's tokenizer has neither {FAST} nor {SENTENCEPIECE} "
            f"(found: {', '.join(sorted(files)) or 'nothing'})"
        )
    tokens = _load_t5(files).get_vocab()
    if (most := max(tokens.values())) >= size:
        raise CheckpointError(
            f"T5's tokenizer gives a token the number {most}, but its text encoder has an embedding for {size} "
            "tokens only: not of one model"
        )


def write_t5(files: Mapping[str, Path], target: Path) -> None:
    """Write T5's tokenizer to the folder ``target`` as tokenizer.json, as transformers has read it, and
    tokenizer_config.json: what swift-transformers looks for. Raises CheckpointError as `check_t5`."""
    t5 = _load_t5(files)
    (target / FAST).write_text(t5.backend_tokenizer.to_str() + "\n", encoding="utf-8")
    special = {name: str(getattr(t5, name)) for name in ("eos_token", "unk_token", "pad_token")}
    _write_json(target / CONFIG, {"tokenizer_class": "T5Tokenizer", **special})


def _load_t5(files: Mapping[str, Path]) -> Any:
    main = files.get(FAST) or files[SENTENCEPIECE]
    if FAST not in files and find_spec("sentencepiece") is None:
        raise InstallationError(f"{main}: run `pip install sentencepiece`, which reads it, or put {FAST} beside it")
    return _loaded("T5Tokenizer", files, main, SENTENCEPIECE, "Unigram", "T5's tokenizer")


def _load(files: Mapping[str, Path]) -> Any:
    main = files.get(FAST) or files["vocab.json"]
    return _loaded("CLIPTokenizer", files, main, "merges.txt", "BPE", "CLIP's byte-pair tokenizer")


def _loaded(name: str, files: Mapping[str, Path], main: Path, no_json: str, kind: str, what: str) -> Any:
    """The tokenizer as diffusers would load it: by transformers' class ``name``, from a folder of these files."""
    import transformers

    for file in files.keys() - {no_json}:
        strict_json.read_object(files[file], CheckpointError, strict_json.MAX_VOCABULARY_BYTES)
    with scratch() as folder:
        for file, path in files.items():
            shutil.copyfile(path, folder / file)
        try:
            made = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
            found = json.loads(made.backend_tokenizer.to_str())["model"]["type"]
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            first = (str(error).splitlines() or [repr(error)])[0]
            raise CheckpointError(f"{main}: not the file of {what}: {first}") from error
    if found != kind:
        raise CheckpointError(f"{main}: a {found} tokenizer; expected {what} ({kind})")
    return made


def _attributes(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
