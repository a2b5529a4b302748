"""The safety checker: blackens pictures that are near one of its concepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Component, Graph, Port, Shape
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.clip_safety import SPECIAL_CARE_ADJUSTMENT, SafetyChecker
from diffusion_runtime.families import AttentionKind

APP_SIZE = 512
"""Height and width in pixels that apps built on Apple's Swift pipeline scale every picture to."""


class Reference(nn.Module):
    """diffusers' StableDiffusionSafetyChecker, with the scores that it decides by. It has no input for
    ``adjustment``, which is 0 here whatever is given."""

    def __init__(self, checker: Any) -> None:
        super().__init__()
        self.checker = checker
        # transformers rounds pictures to the type of these weights, whatever they are then computed in.
        getattr(checker.vision_model, "vision_model", checker.vision_model).embeddings.patch_embedding.float()

    def forward(
        self, clip_input: torch.Tensor, images: torch.Tensor, adjustment: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        del adjustment
        seen: list[torch.Tensor] = []
        # What the checker computes of the picture on its way: computing it again takes as long as all the rest.
        hook = self.checker.visual_projection.register_forward_hook(lambda *told: seen.append(told[2]))
        try:
            with torch_networks.silent():
                filtered, flagged = self.checker(clip_input, images.clone())
        finally:
            hook.remove()
        (picture,) = seen
        special = _scores(picture, self.checker.special_care_embeds, self.checker.special_care_embeds_weights)
        concepts = _scores(picture, self.checker.concept_embeds, self.checker.concept_embeds_weights)
        if special.round(decimals=3).gt(0).any():
            concepts = concepts + SPECIAL_CARE_ADJUSTMENT
        return filtered, torch.tensor(flagged).float().reshape(1, 1, 1, 1), concepts


def _scores(picture: torch.Tensor, embeddings: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(picture, embeddings.float())[None] - thresholds.float()


def build(checkpoint: Checkpoint, attention: AttentionKind | None, shape: Shape) -> Graph:
    checker: Any = torch_networks.build(checkpoint, "safety_checker")
    size = int(checker.config.vision_config.image_size)
    concepts = int(checker.concept_embeds.shape[0])
    clip, pictures = (1, 3, size, size), picture_shapes(shape)
    picture = pictures[0]
    return Graph(
        module=Reference(checker) if attention is None else SafetyChecker(checker, ATTENTION[attention]).eval(),
        inputs=(
            Port(
                "clip_input",
                clip,
                description="The picture, resized and normalised as CLIP's feature extractor does",
            ),
            Port(
                "images", picture, description="The picture in 0..1", shapes=pictures if len(pictures) > 1 else ()
            ),
            Port("adjustment", (1,), description="0, or more to flag more pictures"),
        ),
        outputs=(
            Port("filtered_images", picture, "float32", "The picture, or black where it was flagged"),
            Port("has_nsfw_concepts", (1, 1, 1, 1), "float32", "1 where the picture was flagged, else 0"),
            Port(
                "concept_scores",
                (1, concepts),
                "float32",
                "How near the picture is to each concept; flagged above 0",
            ),
        ),
        sample=lambda seed: _draw(clip, pictures[seed % len(pictures)], seed),
        description="Flags pictures that are near one of its concepts, and blackens them.",
    )


def picture_shapes(shape: Shape) -> tuple[tuple[int, ...], ...]:
    """Of the pictures that are made, and of those that apps hand over whatever they make."""
    # A picture of 512 may be both: one shape then, and no list of shapes to choose from.
    sizes = dict.fromkeys([(shape.height, shape.width), (APP_SIZE, APP_SIZE)])
    return tuple((1, *size, 3) for size in sizes)


def _draw(clip: tuple[int, ...], picture: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {
        "clip_input": rng.standard_normal(clip),
        "images": rng.random(picture),
        "adjustment": np.zeros(1),
    }
    return {name: array.astype(np.float16) for name, array in arrays.items()}


SAFETY_CHECKER = Component(
    name="safety_checker",
    build=build,
    min_psnr_db=60.0,
    runs=2,
)
