"""Train the guided prediction itself, so that a guidance of 7.5, everybody's default, does what 2 does elsewhere.

In this small world a prompt says all that there is to a picture: while there is much noise, the predictions with
and without it, c and u, are far apart, and 7.5 times their difference leads far off every picture; 2 is right. What
is compared with the noise e here is therefore what a sampler uses: u + 7.5 (c - u) is to be u + 2 (e - u), and u is
to be e. The prompt's prediction alone then is a mixture of both, as if a weaker prompt had been given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from denoiser_shapes import Denoiser, predict
from fit_shapes import Fit, Plan

GUIDANCE = 7.5
EFFECTIVE_GUIDANCE = 2.0


class Guidance:
    """The last part of the denoiser's training."""

    def __init__(self, denoiser: Denoiser, plan: Plan) -> None:
        self.denoiser = denoiser
        self.fit = Fit(plan, [denoiser.text_encoder, denoiser.unet])

    def loss(self, generator: torch.Generator) -> Tensor:
        """Weighted errors of the guided prediction, and of the one without a prompt, on one batch."""
        denoiser = self.denoiser
        batch = denoiser.draw(generator)
        told, blind = predict(denoiser.tokenizer, denoiser.text_encoder, denoiser.unet, batch, 1)
        weight, noise = batch.weight.to(told.device), batch.noise.to(told.device)
        guided = blind + GUIDANCE * (told - blind)
        wanted = blind.detach() + EFFECTIVE_GUIDANCE * (noise - blind.detach())
        value: Tensor = (weight * (guided - wanted).square()).mean()
        value += (weight * (blind - noise).square()).mean()
        return value
