"""CLIP's tokenizer is transformers' own, token for token, though that is imported for unusual settings alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusion_runtime.prompt import tokenizer

SHAPES = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes" / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
CONFIG, MAP, ADDED = tokenizer.SETTINGS
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False}
PROMPTS = (
    "a large red circle, on a WHITE   background",
    f"red{END}circle {START} blue",
    "it's Zoë's — 12 squares\u3000日本語 e\u0301 \U0001f600 </w> &amp;",
    "a <cat-toy><cat-toy>_1 sks_1 sks_2 solo solos <RAW> <raw> red!",
    "",
)


def token(content: str, **told: Any) -> dict[str, Any]:
    return {"content": content, "normalized": True, **FLAGS, **told}


def typed(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content)}


PUBLISHED = {  # as in openai/clip-vit-large-patch14 and in Stable Diffusion 1.5
    "add_prefix_space": False,
    "bos_token": typed(START),
    "do_lower_case": True,
    "eos_token": typed(END),
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": END,
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": typed(END),
}
LISTED = {
    "3": token("#", special=False, lstrip=True),
    "900": token("<cat-toy>", special=False),
    "901": token("solo", special=False, single_word=True),
    "902": token("<RAW>", special=False, normalized=False),
}
USUAL: dict[str, dict[str, Any]] = {
    "no settings": {},
    "published": {CONFIG: PUBLISHED, MAP: {"bos_token": token(START), "eos_token": token(END), "pad_token": END}},
    "SDXL's second": {CONFIG: PUBLISHED | {"pad_token": "!"}, MAP: {"bos_token": token(START), "pad_token": "!"}},
    "of one text": {CONFIG: {"eos_token": END, "unk_token": typed(END), "pad_token": END}},
    "a map alone": {MAP: {"eos_token": token(END, special=True), "pad_token": "!"}},
    "added": {CONFIG: {"added_tokens_decoder": LISTED, "pad_token": "#"}, ADDED: {"sks_1": 950}},
    "added end": {CONFIG: {"added_tokens_decoder": {"9": token(END, special=False)}, "eos_token": typed(END)}},
}
UNUSUAL: dict[str, dict[str, Any]] = {
    "added_tokens.json": {ADDED: {"<cat-toy>": 900, "sks_1": 901}},
    "a prefix": {CONFIG: {"add_prefix_space": True}},
    "more special tokens": {CONFIG: {"additional_special_tokens": ["solo"]}},
    "splits": {CONFIG: {"split_special_tokens": True}},
}


@pytest.mark.parametrize("padding", [None, "!"])
@pytest.mark.parametrize("kind", [*USUAL, *UNUSUAL])
def test_tokens_are_those_of_transformers(
    kind: str, padding: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in tokenizer.VOCABULARY_FILES:
        shutil.copyfile(SHAPES / name, tmp_path / name)
    for name, value in (USUAL | UNUSUAL)[kind].items():
        (tmp_path / name).write_text(json.dumps(value))
    if kind in USUAL:
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "transformers", None)  # it cannot be imported
            ours = tokenizer.load(tmp_path, pad_token=padding)
    else:
        ours = tokenizer.load(tmp_path, pad_token=padding)
    theirs = ours.clip if kind in UNUSUAL else tokenizer.load(tmp_path, pad_token=padding).clip
    said, expected = (json.loads(one.to_str()) for one in (ours.backend, theirs.backend_tokenizer))
    for part in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        assert said[part] == expected[part], part
    assert dict(ours.special) == theirs.special_tokens_map and ours.added == theirs.added_tokens_encoder
    for name in ours.special:
        assert ours.number(name) == getattr(theirs, f"{name}_id")
    for prompt in PROMPTS:
        ids = theirs(prompt, add_special_tokens=False)["input_ids"]
        assert ours.backend.encode(prompt, add_special_tokens=False).ids == ids
        if "<raw>" not in prompt:
            assert ours.encode(f"{prompt} {prompt}", 1).ids[0].tolist()[1 : len(ids) + 1] == ids
    lost = ours.encode("red circle " * 60).lost
    assert lost and lost == theirs.decode(theirs("red circle " * 60, add_special_tokens=False)["input_ids"][75:])


def test_a_file_that_asks_for_cut_and_filled_texts_is_not_heeded(tmp_path: Path) -> None:
    whole = tokenizer.load(SHAPES)
    asking = whole.clip.backend_tokenizer
    asking.enable_truncation(3)
    asking.enable_padding(length=9)
    asking.save(str(tmp_path / tokenizer.FAST))
    prompt = "a large red circle on a white background"
    assert tokenizer.load(tmp_path).encode(prompt).ids.tolist() == whole.encode(prompt).ids.tolist()
