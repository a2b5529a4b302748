"""Prompts to the states that the UNet attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    from diffusion_runtime.bundle.manifest import Manifest
    from diffusion_runtime.models import Models
    from diffusion_runtime.prompt.tokenizer import Tokenizer, Tokens

STATES = ("last_hidden_state", "hidden_embeds")


@dataclass(frozen=True, slots=True)
class TextStates:
    """``unet_length`` is how many text tokens the UNet takes.

    A prompt that is too long for the encoder is encoded in as many pieces as the UNet takes, each with its own
    start and end, set one after the other. What is too long even so is cut, or refused with ``long_prompt``."""

    models: Models
    tokenizer: Tokenizer
    manifest: Manifest
    unet_length: int
    long_prompt: bool = False

    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, tuple[str, ...]]:
        """States (texts, width, 1, length) as the UNet takes them, and notes on what was cut. Each distinct text is
        encoded once. An empty text is encoded too, unless the checkpoint wants zeros for it."""
        distinct = list(dict.fromkeys(texts))
        pieces = self._pieces()
        tokens = [self.tokenizer.encode(text, pieces) for text in distinct]
        notes = tuple(self._note(token, pieces) for token in tokens if token.lost)
        states = {text: self._states(text, token) for text, token in zip(distinct, tokens, strict=True)}
        return torch.stack([states[text] for text in texts]), notes

    def _pieces(self) -> int:
        pieces, rest = divmod(self.unet_length, self.tokenizer.length)
        if rest or not pieces:
            raise InputError(
                f"unet: takes {self.unet_length} text tokens, no multiple of the encoder's {self.tokenizer.length}"
            )
        return pieces

    def _note(self, tokens: Tokens, pieces: int) -> str:
        room = (self.tokenizer.length - 2) * len(tokens.ids)
        lost = tokens.lost if len(tokens.lost) <= 300 else tokens.lost[:300] + "…"
        if self.long_prompt:
            raise InputError(
                f"the prompt is longer than the {room} tokens that this UNet has room for (it takes "
                f"{pieces * self.tokenizer.length} with starts and ends): shorten it, leave --long-prompt out to "
                f"cut it, or convert with a larger --context-length; too much is: {lost!r}"
            )
        return f"the prompt was cut after {room} tokens; lost: {lost!r}"

    def _states(self, text: str, tokens: Tokens) -> torch.Tensor:
        encoder = self.models["text_encoder"]
        spec = encoder.inputs["input_ids"]
        name = next((name for name in STATES if name in encoder.outputs), STATES[0])
        rows = [encoder.one(name, input_ids=row[None].astype(spec.dtype)) for row in tokens.ids]
        states = torch.from_numpy(np.concatenate(rows)).float()
        if tokens.is_weighted:
            weights = torch.from_numpy(tokens.weights)[..., None]
            weighted = states * weights
            states = weighted * (states.mean() / weighted.mean())
        if self.manifest.force_zeros_for_empty_prompt and text == "":
            states = torch.zeros_like(states)
        pieces, length, width = states.shape
        return states.reshape(pieces * length, width).T[:, None, :].contiguous()
