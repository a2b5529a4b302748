"""Prompts to the states that the UNet attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion_runtime.errors import InputError
from diffusion_runtime.families import T5, TEXT_ENCODERS, family_named

if TYPE_CHECKING:
    from diffusion_runtime.bundle.manifest import Manifest
    from diffusion_runtime.models import Models
    from diffusion_runtime.prompt.tokenizer import Tokenizer, Tokens

STATES = ("last_hidden_state", "hidden_embeds", "encoder_hidden_states")
UNSKIPPED = "unskipped_states"
"""What a text encoder that was converted with clip skip gives beside them: the states without it. diffusers takes
those for negative prompts."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as the UNet takes them: ``states`` (texts, width, 1, length), and ``pooled`` (texts, width), the last
    encoder's state of the whole text, where it gives one. ``notes`` say what was cut."""

    states: torch.Tensor
    pooled: torch.Tensor | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextStates:
    """``tokenizers`` belong to the CLIP text encoders that there are, in order; ``unet_length`` is how many text
    tokens the UNet takes, ``unet_width`` of how many channels. ``t5``: the tokenizer of T5, the encoder
    that follows CLIP's in Stable Diffusion 3.

    A prompt that is too long for the encoder is encoded in as many pieces as the UNet takes, each with its own
    start and end, set one after the other. What is too long even so is cut, or refused with ``long_prompt``."""

    models: Models
    tokenizers: tuple[Tokenizer, ...]
    manifest: Manifest
    unet_length: int
    unet_width: int = 0
    t5: Tokenizer | None = None
    long_prompt: bool = False

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that these models have; the first of all where they have none, so that it is missed."""
        return tuple(name for name in TEXT_ENCODERS if name in self.models) or TEXT_ENCODERS[:1]

    def encode(self, texts: Sequence[str | None], negative: Sequence[bool] = ()) -> Encoded:
        """Each distinct text is encoded once. ``negative``: which are negative prompts: for those diffusers skips
        no layers. None is a text that was not given: it is zero where the checkpoint wants that (SDXL's), else
        empty. An empty text is encoded as any other."""
        whole = negative if negative and self.manifest.clip_skip else [False] * len(texts)
        given = list(zip(texts, whole, strict=True))
        distinct = list(dict.fromkeys(given))
        states: list[torch.Tensor] = []
        pooled: torch.Tensor | None = None
        notes: dict[str, None] = {}
        for name, tokenizer in zip(self.encoders, self.tokenizers, strict=False):
            pieces = self._pieces(tokenizer)
            tokens = [tokenizer.encode(text or "", pieces) for text, _ in distinct]
            self._check_known(name, tokenizer, tokens)
            notes |= dict.fromkeys(self._note(token, tokenizer, pieces) for token in tokens if token.lost)
            found = [
                self._states(name, token, is_whole) for token, (_, is_whole) in zip(tokens, distinct, strict=True)
            ]
            states.append(torch.stack([one for one, _ in found]))
            wholes = [one for _, one in found if one is not None]
            one = torch.stack(wholes) if wholes else None
            pooled = (
                torch.cat([pooled, one], dim=1) if self.joint and pooled is not None and one is not None else one
            )
            self.models.release(name)
        together = (
            self._joined(states, [text or "" for text, _ in distinct], notes)
            if self.joint
            else torch.cat(states, dim=1)
        )
        missing = [index for index, (text, _) in enumerate(distinct) if text is None]
        if self.manifest.force_zeros_for_empty_prompt and missing:
            # As diffusers' SDXL: zeros stand for a negative prompt that is not given, never for an empty one that
            # is.
            together[missing] = 0.0
            if pooled is not None:
                pooled[missing] = 0.0
        rows = [distinct.index(one) for one in given]
        return Encoded(together[rows], None if pooled is None else pooled[rows], tuple(notes))

    @property
    def joint(self) -> bool:
        return family_named(self.manifest.family).joint_text

    def _joined(self, clip: Sequence[torch.Tensor], texts: Sequence[str], notes: dict[str, None]) -> torch.Tensor:
        """CLIP's states side by side, filled with zeros to the width of T5's, which follow; zeros where there is no
        T5: (texts, width, 1, tokens)."""
        together = torch.cat(list(clip), dim=1)
        rest = self.unet_length - together.shape[3]
        if self.t5 is None:
            following = torch.zeros(len(texts), self.unet_width, 1, rest)
        else:
            tokens = [self.t5.encode(text) for text in texts]
            self._check_known(T5, self.t5, tokens)
            notes |= dict.fromkeys(self._note(token, self.t5, 1) for token in tokens if token.lost)
            following = torch.stack([self._states(T5, token, is_whole=True)[0] for token in tokens])
            self.models.release(T5)
        if following.shape[1:] != (self.unet_width, 1, rest):
            raise InputError(
                f"transformer: takes {self.unet_length} text tokens of {self.unet_width} channels, but T5 gives "
                f"{following.shape[3]} of {following.shape[1]} after CLIP's {together.shape[3]}"
            )
        filled = torch.nn.functional.pad(together, (0, 0, 0, 0, 0, self.unet_width - together.shape[1]))
        return torch.cat([filled, following], dim=3)

    def _pieces(self, tokenizer: Tokenizer) -> int:
        if self.joint:
            return 1
        pieces, rest = divmod(self.unet_length, tokenizer.length)
        if rest or not pieces:
            raise InputError(
                f"unet: takes {self.unet_length} text tokens, no multiple of the encoder's {tokenizer.length}"
            )
        return pieces

    def _check_known(self, name: str, tokenizer: Tokenizer, tokens: Sequence[Tokens]) -> None:
        """An embedding that ends before a token's number gives what happens to be there, or zeros."""
        described = self.manifest.components.get(name)
        size = described.vocabulary_size if described is not None else None
        if size is None or not (unknown := sorted({int(n) for one in tokens for n in one.ids.flat if n >= size})):
            return
        raise InputError(
            f"the tokenizer gives {tokenizer.backend.id_to_token(unknown[0])!r} the number {unknown[0]}, "
            f"but the {name} knows {size} tokens only: leave it out of the prompt, or name the tokenizer that "
            "belongs to these models with --tokenizer"
        )

    def _note(self, tokens: Tokens, tokenizer: Tokenizer, pieces: int) -> str:
        room = tokenizer.room * len(tokens.ids)
        lost = tokens.lost if len(tokens.lost) <= 300 else tokens.lost[:300] + "…"
        if self.long_prompt:
            raise InputError(
                f"the prompt is longer than the {room} tokens that this UNet has room for (it takes "
                f"{pieces * tokenizer.length} with starts and ends): shorten it, leave --long-prompt out to "
                f"cut it, or convert with a larger --context-length; too much is: {lost!r}"
            )
        return f"the prompt was cut after {room} tokens; lost: {lost!r}"

    def _states(self, name: str, tokens: Tokens, is_whole: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(width, 1, length) states of a text's pieces, and the pooled state of the first one. ``is_whole``: of all
        layers, whatever the models' clip skip."""
        encoder = self.models[name]
        spec = encoder.inputs["input_ids"]
        names = (UNSKIPPED, *STATES) if is_whole else STATES
        wanted = next((one for one in names if one in encoder.outputs), STATES[0])
        ids = [row[None].astype(spec.dtype) for row in tokens.ids]
        rows = [encoder.several(wanted, "pooled_outputs", input_ids=piece) for piece in ids]
        found = np.concatenate([row[0] for row in rows])
        if found.ndim == 4:  # T5's, which come as the denoiser takes them
            found = found[:, :, 0].transpose(0, 2, 1)
        states = torch.from_numpy(found).float()
        if tokens.is_weighted:
            weights = torch.from_numpy(tokens.weights)[..., None]
            weighted = states * weights
            # The mean of all states stays what it was, as in the web interfaces that this syntax comes from.
            states = weighted * (states.mean() / weighted.mean())
        pieces, length, width = states.shape
        # Pooled states are trained on whole texts of 77 tokens: that of the first piece, as in the field.
        pooled = rows[0][1]
        return (
            states.reshape(pieces * length, width).T[:, None, :].contiguous(),
            None if pooled is None else torch.from_numpy(pooled).float().reshape(-1),
        )
