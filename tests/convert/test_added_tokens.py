"""Tokens added to a vocabulary: `generate` gives a prompt the ids that transformers gives it in the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_convert.checkpoint.vocabulary import TOKENIZER_FILES, write_vocabulary
from diffusion_runtime.errors import DiffusionError
from diffusion_runtime.prompt import tokenizer

PROMPTS = (
    "a photo of <cat-toy>",
    "<cat-toy><cat-toy> and <cat-toy>, <CAT-TOY>",
    "a<cat-toy>b sks_1 sks_2",
    "a red circle",
    "",
    " ".join(["<cat-toy>"] * 90),
)


def with_added(source: Path, folder: Path, kind: str) -> Any:
    """A tokenizer with tokens added as textual inversion adds them, saved as ``kind`` says."""
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer.from_pretrained(str(source), local_files_only=True)
    clip.add_tokens(["<cat-toy>", "sks_1", "sks_2"])
    clip.save_pretrained(str(folder))
    assert (folder / "tokenizer.json").is_file()
    if kind != "tokenizer.json":
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(source / name, folder / name)
    if kind == "added_tokens.json":
        (folder / "tokenizer.json").unlink()
        shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
        (folder / "added_tokens.json").write_text(json.dumps(clip.get_added_vocab()))
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("kind", ["tokenizer.json", "all files", "added_tokens.json"])
@pytest.mark.parametrize("family", ["sd1", "sd2-base"])
@pytest.mark.parametrize("written", [True, False], ids=["converted", "as it is"])
def test_ids_are_those_of_the_checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, kind: str, written: bool
) -> None:
    folder, target = tmp_path / "tokenizer", tmp_path / "models"
    theirs = with_added(tiny_checkpoint(family) / "tokenizer", folder, kind)
    target.mkdir()
    write_vocabulary({name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}, target)
    ours = tokenizer.load(target if written else folder)
    added = theirs.convert_tokens_to_ids("<cat-toy>")
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt).ids[0].tolist() == expected, prompt
        assert (added in expected) == ("<cat-toy>" in prompt)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("text", ["[" * 5000, "{", '{"added_tokens": [{"content": 3}], "model": 3}', "[]", "3"])
def test_damaged_settings_end_in_one_line(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, name: str, text: str
) -> None:
    folder = shutil.copytree(tiny_checkpoint("sd1") / "tokenizer", tmp_path / "tokenizer")
    (folder / name).write_text(text)
    try:
        tokenizer.load(folder)  # some of it is harmless: transformers passes over it
    except DiffusionError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
