"""diffusers' StableDiffusionSafetyChecker without Python loops and conditions, ready to be traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_convert.networks.attention import Attend
from diffusion_convert.networks.clip import VisionEncoder

# diffusers rounds scores to three decimals and then asks whether they are positive.
ROUNDS_TO_POSITIVE = 0.0005

# How much nearer every concept is deemed to be once a special-care concept was found.
SPECIAL_CARE_ADJUSTMENT = 0.01


class SafetyChecker(nn.Module):
    """clip_input (1, 3, size, size), images (1, height, width, 3), adjustment (1,) -> filtered_images (1, height,
    width, 3), has_nsfw_concepts (1, 1, 1, 1), concept_scores (1, concepts).

    A score is the cosine between the picture and a concept, less the concept's threshold, plus the adjustment; a
    picture with a positive score is flagged, and black in filtered_images. The adjustment is the input's value (0
    in diffusers; the larger, the more is flagged), at least 0.01 where a special-care concept was found with it.
    """

    concepts: torch.Tensor
    concept_biases: torch.Tensor
    special: torch.Tensor
    special_biases: torch.Tensor

    def __init__(self, checker: Any, attend: Attend) -> None:
        super().__init__()
        self.vision_model = VisionEncoder(checker.vision_model, attend)
        self.visual_projection = checker.visual_projection
        for name, embeddings, thresholds in (
            ("concepts", checker.concept_embeds, checker.concept_embeds_weights),
            ("special", checker.special_care_embeds, checker.special_care_embeds_weights),
        ):
            self.register_buffer(name, nn.functional.normalize(embeddings.detach().float()))
            self.register_buffer(f"{name.removesuffix('s')}_biases", -thresholds.detach().float())

    def forward(
        self, clip_input: torch.Tensor, images: torch.Tensor, adjustment: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        picture = self.visual_projection(self.vision_model(clip_input))
        picture = picture / picture.norm(dim=1, keepdim=True)
        special_scores = nn.functional.linear(picture, self.special, self.special_biases) + adjustment
        special = positive(special_scores)
        adjusted = adjustment + special * torch.relu(SPECIAL_CARE_ADJUSTMENT - adjustment)
        concept_scores = nn.functional.linear(picture, self.concepts, self.concept_biases) + adjusted
        flagged = positive(concept_scores).reshape(1, 1, 1, 1)
        return images * (1.0 - flagged), flagged, concept_scores


def positive(scores: torch.Tensor) -> torch.Tensor:
    """1.0 where any score of a picture rounds to a positive number, else 0.0: (1, scores) -> (1, 1)."""
    return (scores.amax(dim=1, keepdim=True) > ROUNDS_TO_POSITIVE).float()
