"""What a conversion can put into the models because apps have it fixed: the foldings, in one table.

manifest.json describes the models as they are; what was folded, with the checkpoint's own values, is in its
``folded`` (`bundle.manifest.Folded`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class About:
    """``by_default``: done unless `--no-fold` says otherwise, else only with `--fold`. ``fixed``: what apps have
    fixed, as half a sentence."""

    by_default: bool
    fixed: str


class Folding(enum.Enum):
    """The names that `--fold` and `--no-fold` take."""

    LATENT_SCALE = "latent-scale"
    PADDING = "padding"
    PREDICTION = "prediction"

    @property
    def about(self) -> About:
        return _FOLDINGS[self]


_FOLDINGS: Mapping[Folding, About] = {
    Folding.LATENT_SCALE: About(True, "divide latents by 0.18215 (Stable Diffusion XL: 0.13025)"),
    Folding.PADDING: About(True, "pad prompts with <|endoftext|>"),
    # Not by default: diffusers' PNDM mixes the predictions of several steps as they are, so a folded model draws
    # another picture with it.
    Folding.PREDICTION: About(False, "take the UNet's output for noise (epsilon)"),
}
"""To add one: a member above, an entry here, a field of `bundle.manifest.Folded` and what it does to the networks
in `diffusion_convert/networks/folding.py`."""
