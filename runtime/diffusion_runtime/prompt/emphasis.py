"""Weighted prompts: "a (red:1.3) circle" draws the encoder's attention to "red".

Only an explicit number is a weight: "(text:1.3)", nested ones multiply. Every other bracket is text, so that a
prompt without weights means exactly what it means to diffusers. ``\\(`` and ``\\)`` are brackets in any case.
The meaning of a weight is that of AUTOMATIC1111's web UI: the encoder's states are multiplied, token by token, and
then scaled back to the mean that they had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffusion_runtime.errors import InputError

_WEIGHT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
MAX_WEIGHT = 10.0


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of a prompt, and how much it counts."""

    text: str
    weight: float = 1.0


def parse(prompt: str) -> tuple[Fragment, ...]:
    """The fragments of a prompt in order. Raises InputError for a weight that cannot be used."""
    closings = _closings(prompt)
    fragments: list[Fragment] = []
    weights = [1.0]
    text = ""
    position = 0
    while position < len(prompt):
        if prompt.startswith(("\\(", "\\)"), position):
            text += prompt[position + 1]
            position += 2
        elif position in closings.openings:
            fragments.append(Fragment(text, weights[-1]))
            weights.append(_nested(weights[-1], closings.openings[position]))
            text, position = "", position + 1
        elif position in closings.ends:
            fragments.append(Fragment(text, weights[-1]))
            weights.pop()
            text, position = "", closings.ends[position]
        else:
            text += prompt[position]
            position += 1
    fragments.append(Fragment(text, weights[-1]))
    return tuple(fragment for fragment in fragments if fragment.text) or (Fragment(""),)


@dataclass(frozen=True, slots=True)
class _Closings:
    """``openings``: index of a weighted "(" -> its weight. ``ends``: index of its ":" -> index after its ")"."""

    openings: dict[int, float]
    ends: dict[int, int]


def _closings(prompt: str) -> _Closings:
    found = _Closings({}, {})
    stack: list[int] = []
    position = 0
    while position < len(prompt):
        if prompt.startswith(("\\(", "\\)"), position):
            position += 2
            continue
        character = prompt[position]
        if character == "(":
            stack.append(position)
        elif character == ")" and stack:
            stack.pop()
        elif character == ":" and stack and (match := _WEIGHT.match(prompt, position)):
            found.openings[stack.pop()] = _weight(match.group(1))
            found.ends[position] = match.end()
            position = match.end()
            continue
        position += 1
    return found


def _nested(outer: float, inner: float) -> float:
    if outer * inner > MAX_WEIGHT:
        raise InputError(f"nested prompt weights come to {outer * inner:g}: expected at most {MAX_WEIGHT:g}")
    return outer * inner


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value <= MAX_WEIGHT:
        raise InputError(
            f"prompt weight {text}: expected 0 to {MAX_WEIGHT:g} (write \\( for a bracket that is no weight)"
        )
    return value
