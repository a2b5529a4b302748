"""CLIP's tokenizer from its usual files, as transformers makes it of them, without importing transformers.

That import took a quarter of the time until the first step of a small model. What is not usual is transformers' to
understand: `plain` says None of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

END = "<|endoftext|>"
SPECIAL: Mapping[str, str] = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": END}
"""The special tokens by transformers' names, as they are where no file tells."""
WORD_END = "</w>"
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_LISTED = "added_tokens_decoder"
_WITHOUT_EFFECT = (
    *("backend", "clean_up_tokenization_spaces", "do_lower_case", "errors", "is_local", "local_files_only"),
    *("model_max_length", "name_or_path", "special_tokens_map_file", "tokenizer_class"),
)
"""Settings that change nothing of the tokens that transformers' CLIPTokenizer makes of a text."""
_KNOWN = frozenset({*SPECIAL, *_WITHOUT_EFFECT, _LISTED, "add_prefix_space"})
_FLAGS = frozenset({"lstrip", "normalized", "rstrip", "single_word"})
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True)
class Made:
    """A tokenizer of the tokenizers library, and its special tokens by transformers' names."""

    backend: Tokenizer
    special: Mapping[str, str]


def plain(folder: Path, settings: Mapping[str, Any], given: Mapping[str, str]) -> Made | None:
    """The tokenizer of vocab.json and merges.txt in ``folder``; None where its settings are unusual.

    ``settings``: what the other JSON files there hold, by name. ``given``: special tokens that count for more.
    Raises what the tokenizers library raises for damaged files."""
    try:
        added, special = _tokens(settings, given)
    except (AttributeError, TypeError, ValueError):  # another value than the usual one
        return None
    model = models.BPE(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token=special["unk_token"],
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return Made(backend, special)


def _tokens(settings: Mapping[str, Any], given: Mapping[str, str]) -> tuple[list[AddedToken], dict[str, str]]:
    """All tokens to be added to the vocabulary, in order, and the special ones by name."""
    config = settings.get(CONFIG, {})
    listed = config.get(_LISTED)
    # Where the configuration lists the added tokens, the older files beside it are not read.
    older = settings.get(MAP, {}) if listed is None else {}
    strange = (config.keys() - _KNOWN) | (older.keys() - SPECIAL.keys())
    if strange or config.get("add_prefix_space") or (listed is None and ADDED in settings):
        raise ValueError
    tokens: list[AddedToken | str] = [
        _token(token, "special")
        for _, token in sorted((int(number), token) for number, token in (listed or {}).items())
    ]
    known = {str(token): token for token in tokens}
    told = {**SPECIAL, **{name: config[name] for name in SPECIAL if name in config}, **older, **given}
    special = [known.get(str(token), token) for token in map(_token, told.values())]
    # Of two that differ only in how they match the last counts, so order and omissions are transformers', too.
    for token in special:
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    names = dict(zip(told, map(str, special), strict=True))
    made = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in made:
        token.special = token.special or token.content in names.values()
    return made, names


def _token(told: Any, *more: str) -> AddedToken | str:
    """A token as a file has it: its text, or an object that says how it matches."""
    if isinstance(told, str):
        return told
    flags = {name: told[name] for name in told.keys() - {"content", "__type"}}
    if flags.keys() - {"special"} != _FLAGS or not flags.keys() >= set(more):
        raise ValueError
    return AddedToken(told["content"], **flags)
