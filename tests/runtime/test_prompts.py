"""Weighted prompts, and what the encoder is given for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_runtime.errors import InputError
from diffusion_runtime.prompt.emphasis import Fragment, is_weighted, parse
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
    assert not is_weighted(prompt)


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


def test_tokens_are_diffusers(reference: Callable[[str], Any]) -> None:
    found = reference("sd1")
    clip, ours = found.diffusers.tokenizer, found.pipeline().tokenizer
    for prompt in ("A  Cat, 日本 🐱!", "", "x" * 500, "a photo of an astronaut (riding) a horse"):
        theirs = clip(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt).ids[0].tolist() == theirs


def test_padding_is_the_checkpoints_own(reference: Callable[[str], Any]) -> None:
    assert reference("sd2-base").pipeline().tokenizer.encode("a cat").ids[0][-1] == 0  # "!"
    assert reference("sd1").pipeline().tokenizer.encode("a cat").ids[0][-1] != 0


def test_weights_follow_their_tokens_into_the_second_piece(reference: Callable[[str], Any]) -> None:
    tokens = reference("sd1").pipeline().tokenizer.encode("cat " * 74 + "(red horse:1.5)", pieces=2)
    assert tokens.lost == ""
    assert np.argwhere(tokens.weights == 1.5).tolist() == [[0, 75], [1, 1]]
    assert tokens.ids[:, 0].tolist() == [tokens.ids[0, 0]] * 2
