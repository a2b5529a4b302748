"""Weighted prompts, and what the encoder is given for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from diffusion_runtime.errors import InputError
from diffusion_runtime.prompt import tokenizer
from diffusion_runtime.prompt.emphasis import Fragment, parse
from diffusion_runtime.prompt.text_states import TextStates


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a red circle", [("a red circle", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red:1.3) circle", [("a ", 1.0), ("red", 1.3), (" circle", 1.0)]),
        ("(a (red:1.5) cat:2)", [("a ", 2.0), ("red", 3.0), (" cat", 2.0)]),
        ("(dim: .5 )", [("dim", 0.5)]),
        ("(plain) [also] {this}", [("(plain) [also] {this}", 1.0)]),
        (r"\(red:1.3\)", [("(red:1.3)", 1.0)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        ("time: 10:30", [("time: 10:30", 1.0)]),
        ("(unclosed:1.3", [("(unclosed:1.3", 1.0)]),
        ("unopened:1.3)", [("unopened:1.3)", 1.0)]),
        ("((double):1.4)", [("(double)", 1.4)]),
        ("(none:0)", [("none", 0.0)]),
    ],
)
def test_only_an_explicit_number_is_a_weight(prompt: str, fragments: list[tuple[str, float]]) -> None:
    assert [(fragment.text, round(fragment.weight, 6)) for fragment in parse(prompt)] == fragments


@pytest.mark.parametrize("prompt", ["(a:11)", "(a:-1)"])
def test_weights_out_of_range_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match=r"expected 0 to 10 \(write \\\( for a bracket"):
        parse(prompt)


def test_nested_weights_stay_within_the_same_range() -> None:
    with pytest.raises(InputError, match="nested prompt weights come to 81: expected at most 10"):
        parse("((a:9) cat:9)")


@given(st.text(alphabet="ab[]{}.,\n ", max_size=40))
def test_a_prompt_without_weights_is_kept_as_it_is(prompt: str) -> None:
    assert parse(prompt) == (Fragment(prompt),)


@given(st.text(alphabet="ab():\\1.5 ", max_size=40))
def test_no_word_is_lost_whatever_the_markup(prompt: str) -> None:
    try:
        fragments = parse(prompt)
    except InputError:
        return
    letters = [character for fragment in fragments for character in fragment.text if character in "ab"]
    assert letters == [character for character in prompt if character in "ab"]


def test_weighted_states_are_scaled_and_brought_back_to_their_mean(reference: Callable[[str], Any]) -> None:
    pipeline = reference("sd1").pipeline()
    encoder = TextStates(pipeline.models, (pipeline.tokenizer,), pipeline.manifest, 77)
    encoded = encoder.encode(["a red circle", "a (red:1.5) circle"])
    plain, weighted = encoded.states
    factors = torch.ones(77)
    factors[2] = 1.5  # start, a, red
    scaled = plain * factors
    assert encoded.notes == ()
    assert torch.allclose(weighted, scaled * (plain.mean() / scaled.mean()), atol=1e-5)
    assert weighted.shape == (32, 1, 77)


STRANGE = (
    "A  Cat, 日本 🐱!",
    "",
    "x" * 500,
    "a photo of an astronaut (riding) a horse",
    " ",
    "\n\t \r\n\x0b\x0c",
    "a\0b",
    "\0",
    "a cat\0",
    "a\x01\x02b\x1f c\x7f \x1c\x1d",
    "a\u200db a\u200b b \u202eabc\u202c",  # joiners, and text from right to left
    "\ufeffa cat\ufeff",
    "a\u2028b\u2029c\u0085d\u00a0e\u3000f",
    "日本語の猫 中文 한국어，。！",
    "👩\u200d👩\u200d👧\u200d👦 family 🏳️\u200d🌈 👍🏽",
    "e\u0301clair e\u0308\u0301 Å A\u030a a" + "\u0301" * 40,
    "supercalifragilistic" * 50,
    "a </w> b</w>",
    "a <|endoftext|> b <|startoftext|>c<|endoftext|>",
    "<|ENDOFTEXT|> x",
    "<|endoftext|>" * 80,
    "it's we'll I'M THEY'RE 's's s don´t",
    "İstanbul ß ſ ǅ Σς ﬁ ① Ⅻ ᾳ \u1e9e",
    "1234567 ½ ٣ ⅷ 10³ a_b_c !!!???...---",
    "a\\nb \\ ((a)) [UNK]",
    "\ue000\uf8ff \U0010ffff \ufffe \uffff",
    "cat " * 200,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own tokenizer, as checkpoints have it."""
    from diffusion_convert.checkpoint import ldm_configs

    clip, folder = ldm_configs.FOLDER / "clip", tmp_path_factory.mktemp("clip")
    for path in (clip / "vocab.json", clip / "merges.txt", *(clip / "pad-end-of-text").iterdir()):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.mark.parametrize("prompt", STRANGE, ids=range(len(STRANGE)))
def test_tokens_are_those_of_transformers(reference: Callable[[str], Any], published: Path, prompt: str) -> None:
    for folder in (reference("sd1").folder / "tokenizer", published):
        clip = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        theirs = clip(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert tokenizer.load(folder).encode(prompt).ids[0].tolist() == theirs


@pytest.mark.parametrize("prompt", ["a\0b", "\ufeffa \x1b[31mcat", "👩\u200d👧 日本語"])
def test_strange_prompts_are_drawn_as_by_diffusers(
    reference: Callable[[str], Any], psnr_db: Callable[[Any, Any], float], prompt: str
) -> None:
    found = reference("sd2-base")
    pictures = [
        one(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
        for one in (found.pipeline(), found.diffusers)
    ]
    assert psnr_db(*map(np.asarray, pictures)) >= 40.0


def test_padding_is_the_checkpoints_own(reference: Callable[[str], Any]) -> None:
    assert reference("sd2-base").pipeline().tokenizer.encode("a cat").ids[0][-1] == 0  # "!"
    assert reference("sd1").pipeline().tokenizer.encode("a cat").ids[0][-1] != 0


def test_weights_follow_their_tokens_into_the_second_piece(reference: Callable[[str], Any]) -> None:
    tokens = reference("sd1").pipeline().tokenizer.encode("cat " * 74 + "(red horse:1.5)", pieces=2)
    assert tokens.lost == ""
    assert np.argwhere(tokens.weights == 1.5).tolist() == [[0, 75], [1, 1]]
    assert tokens.ids[:, 0].tolist() == [tokens.ids[0, 0]] * 2
