"""The safety checker of the shapes checkpoint: flags stars, as the real one flags what must not be shown.

The class compares a picture's embedding with 17 concepts and 3 special-care concepts, each with a threshold. Here
the first concept is "a star" and the first special-care concept "a small star" (where it applies, the thresholds of
the concepts fall by 0.01); the others are there for the shape and never apply. It learns from pictures as they come
out of the decoder, drawn ones and the model's own, and its threshold is set on others that it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, normalize
from transformers import CLIPConfig, CLIPImageProcessor

from autoencoder_shapes import decode_pool, draw_pool, encode_pool
from fit_shapes import Fit, Plan
from judge_shapes import FLAGGED_SHAPE, captions

THRESHOLD = 0.5  # cosine above which the two trained concepts apply, in training
NEVER = 1.05  # a cosine is at most 1, and special care lowers the threshold by 0.01
SHARPNESS = 12.0  # logits per unit of cosine
BATCH = 40
MAX_SHIFT = 10  # pixels of the enlarged picture
EMBED_WIDTH = 32
INPUT_SIZE = 224

GENERATED = 8  # pictures of every caption that the model itself draws, of which the last HELD_OUT set the threshold
HELD_OUT = 2
GENERATED_SEED = 1_000_000  # far from those that the quality is measured with
STEPS, GUIDANCE = (12, 20, 30), (4.0, 7.5, 10.0)


@dataclass(frozen=True)
class Pictures:
    """Bytes (captions, pictures, 3, 64, 64): the model's own, and drawn ones that went through the autoencoder."""

    generated: Tensor
    decoded: Tensor

    def learnt(self) -> Tensor:
        """All but the held-out ones."""
        return torch.cat([self.generated[:, :-HELD_OUT], self.decoded[:, :-HELD_OUT]], dim=1)

    def held_out(self) -> Tensor:
        """Those that the checker does not learn from."""
        return torch.cat([self.generated[:, -HELD_OUT:], self.decoded[:, -HELD_OUT:]], dim=1)


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


def enlarge(pictures: Tensor) -> Tensor:
    """Bytes (batch, 3, h, w) to bytes (batch, 3, 224, 224), as the processor enlarges them.

    With ``antialias`` torch's bicubic curve is Pillow's, which the processor uses; without, it is another one."""
    return interpolate(pictures, size=INPUT_SIZE, mode="bicubic", antialias=True)


def clip_input(large: Tensor, processor: CLIPImageProcessor) -> Tensor:
    """What the processor makes of enlarged bytes (batch, 3, 224, 224)."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (large.float() / 255.0 - mean) / deviation


def vary(large: Tensor, random: Random) -> Tensor:
    """The same shape in an enlarged picture, bytes (3, 224, 224): elsewhere, in other colours, mirrored.

    What goes out on one side comes in on the other: there is nothing but background."""
    moved = large.roll((random.randint(-MAX_SHIFT, MAX_SHIFT), random.randint(-MAX_SHIFT, MAX_SHIFT)), (1, 2))
    mirrored = moved.flip(2) if random.random() < 0.5 else moved
    return mirrored[random.sample(range(3), 3)]


def make_pictures(folder: Path, saved: Path, seed: int, device: torch.device) -> Pictures:
    """What the checker of the checkpoint in ``folder`` is to judge; kept in the file ``saved``."""
    if saved.exists():
        return Pictures(**torch.load(saved, weights_only=True))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipeline.to(device).set_progress_bar_config(disable=True)
    pool = draw_pool(seed)
    decoded = decode_pool(pipeline.vae, encode_pool(pipeline.vae, pool, device), device)
    pictures = Pictures(generate_pool(pipeline, seed), decoded)
    torch.save(vars(pictures), saved)
    return pictures


def generate_pool(pipeline: StableDiffusionPipeline, seed: int) -> Tensor:
    """GENERATED pictures of every caption, bytes (captions, pictures, 3, 64, 64), by few and many steps."""
    random = Random(seed)
    rows = []
    for index, caption in enumerate(captions()):
        first = GENERATED_SEED + GENERATED * index
        made = pipeline(
            [caption.text] * GENERATED,
            num_inference_steps=random.choice(STEPS),
            guidance_scale=random.choice(GUIDANCE),
            generator=[torch.Generator().manual_seed(first + i) for i in range(GENERATED)],
        ).images
        rows.append(torch.stack([torch.tensor(np.asarray(image)) for image in made]))
        if index % 21 == 20:
            print(f"generated pictures: {index + 1} of {len(captions())} captions", flush=True)
    return torch.stack(rows).permute(0, 1, 4, 2, 3).contiguous()


def train_checker(plan: Plan, pictures: Tensor, device: torch.device) -> StableDiffusionSafetyChecker:
    """Train on pictures, bytes (captions, pictures, 3, h, w), half of each batch the flagged shape."""
    torch.manual_seed(plan.seed)
    model = build_checker().to(device)
    model.concept_embeds.requires_grad_(False)
    flagged = torch.tensor([caption.shape == FLAGGED_SHAPE for caption in captions()])
    small = torch.tensor([caption.size == "small" for caption in captions()])
    processor = build_feature_extractor()
    large = torch.stack([enlarge(row) for row in pictures])
    rows_of = [flagged.nonzero().flatten(), (~flagged).nonzero().flatten()]

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.cat([rows[torch.randint(len(rows), (BATCH // 2,), generator=generator)] for rows in rows_of])
        chosen = torch.randint(pictures.shape[1], rows.shape, generator=generator)
        random = Random(int(torch.randint(2**31, (1,), generator=generator)))
        x = clip_input(torch.stack([vary(one, random) for one in large[rows, chosen]]), processor)
        cosines = _cosines(model, x.to(device))
        targets = torch.stack([flagged[rows], flagged[rows] & small[rows]], dim=1).float().to(device)
        return binary_cross_entropy_with_logits(SHARPNESS * (cosines - THRESHOLD), targets)

    fit = Fit(plan, [model])
    fit.run(loss)
    fit.use_average()
    return model


@torch.no_grad()
def calibrate(model: StableDiffusionSafetyChecker, pictures: Tensor, device: torch.device) -> str:
    """Put the concepts' thresholds where they part the held-out pictures best; says how well they do.

    Best: fewest pictures on the wrong side, and, of the thresholds that are equal in this, the middle one."""
    processor = build_feature_extractor()
    flagged = torch.tensor([caption.shape == FLAGGED_SHAPE for caption in captions()])
    small = flagged & torch.tensor([caption.size == "small" for caption in captions()])
    rows = [_cosines(model, clip_input(enlarge(row), processor).to(device)).cpu() for row in pictures]
    cosines = torch.stack(rows)  # (captions, pictures, 2)
    thresholds = (model.concept_embeds_weights, model.special_care_embeds_weights)
    said = []
    for index, (wanted, weights) in enumerate(zip((flagged, small), thresholds, strict=True)):
        inside, outside = cosines[wanted, :, index], cosines[~wanted, :, index]
        grid = torch.linspace(-0.5, 0.99, 1491)
        wrong = (inside[..., None] <= grid).sum((0, 1)) + (outside[..., None] > grid).sum((0, 1))
        best = (wrong == wrong.min()).nonzero().flatten()
        weights[0] = float(grid[best[len(best) // 2]])
        said.append(f"{float(weights[0]):.3f}, {int(wrong.min())} of {cosines[..., 0].numel()} wrong")
    return f"concept {said[0]}; special care {said[1]}"


def _cosines(model: StableDiffusionSafetyChecker, x: Tensor) -> Tensor:
    """Of pictures as the processor makes them with the two trained concepts, (batch, 2)."""
    embeds = normalize(model.visual_projection(model.vision_model(x).pooler_output))
    concepts = normalize(torch.stack([model.concept_embeds[0], model.special_care_embeds[0]]))
    cosines: Tensor = embeds @ concepts.T
    return cosines
