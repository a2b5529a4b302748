"""The safety checker of the shapes checkpoint: flags stars, as the real one flags what must not be shown.

The class compares a picture's embedding with 17 concepts and 3 special-care concepts, each with a threshold. Here
the first concept is "a star" and the first special-care concept "a small star" (where it applies, the thresholds of
the concepts fall by 0.01); the others are there for the shape and never apply.
"""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from fit_shapes import Fit, Plan
from judge_shapes import FLAGGED_SHAPE, captions
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, normalize
from transformers import CLIPConfig, CLIPImageProcessor

THRESHOLD = 0.5  # cosine above which the two trained concepts apply
NEVER = 1.05  # a cosine is at most 1, and special care lowers the threshold by 0.01
SHARPNESS = 12.0  # logits per unit of cosine
BATCH = 64
PIXEL_NOISE = 0.1  # in units of the normalised input
EMBED_WIDTH = 32
INPUT_SIZE = 224


def build_feature_extractor() -> CLIPImageProcessor:
    """CLIP's: bicubic to 224 x 224, CLIP's mean and deviation."""
    return CLIPImageProcessor()


def build_checker() -> StableDiffusionSafetyChecker:
    """An untrained one: three layers of 96 channels on 7 x 7 patches of (3, 224, 224)."""
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": INPUT_SIZE,
        "patch_size": 32,
    }
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED_WIDTH)
    )
    with torch.no_grad():
        model.concept_embeds.normal_()
        model.special_care_embeds.normal_()
        for thresholds in (model.concept_embeds_weights, model.special_care_embeds_weights):
            thresholds.fill_(NEVER)
            thresholds[0] = THRESHOLD
    return model


def clip_input(pictures: Tensor, processor: CLIPImageProcessor) -> Tensor:
    """Bytes (batch, 3, h, w) to what the processor makes of them, (batch, 3, 224, 224)."""
    large = interpolate(pictures.float() / 255.0, size=INPUT_SIZE, mode="bicubic").clamp(0, 1)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (large - mean) / deviation


def train_checker(plan: Plan, pictures: Tensor, device: torch.device) -> StableDiffusionSafetyChecker:
    """Train on pictures, bytes (captions, pictures, 3, h, w), half of each batch the flagged shape."""
    torch.manual_seed(plan.seed)
    model = build_checker().to(device)
    model.concept_embeds.requires_grad_(False)
    flagged = torch.tensor([caption.shape == FLAGGED_SHAPE for caption in captions()])
    small = torch.tensor([caption.size == "small" for caption in captions()])
    processor = build_feature_extractor()
    rows_of = [flagged.nonzero().flatten(), (~flagged).nonzero().flatten()]

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.cat([rows[torch.randint(len(rows), (BATCH // 2,), generator=generator)] for rows in rows_of])
        chosen = torch.randint(pictures.shape[1], rows.shape, generator=generator)
        x = clip_input(pictures[rows, chosen], processor)
        x = x + PIXEL_NOISE * torch.randn(x.shape, generator=generator)
        pooled = model.vision_model(x.to(device)).pooler_output
        embeds = normalize(model.visual_projection(pooled))
        concepts = normalize(torch.stack([model.concept_embeds[0], model.special_care_embeds[0]]))
        logits = SHARPNESS * (embeds @ concepts.T - THRESHOLD)
        targets = torch.stack([flagged[rows], flagged[rows] & small[rows]], dim=1).float().to(device)
        return binary_cross_entropy_with_logits(logits, targets)

    fit = Fit(plan, [model])
    fit.run(loss)
    fit.use_average()
    return model
