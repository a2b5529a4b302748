"""Train a small CLIP on the drawn shapes: it says how well a picture fits a caption, as `coreml-sd evaluate` asks.

Texts may leave something out ("a red circle"), so that several pictures of a batch can fit one: all of them are
right (Khosla et al. 2020, arXiv 2004.11362, in CLIP's symmetric loss). Texts also choose between the pictures and
spoilt ones, mixtures of two: so a picture that is half one thing and half another scores low, as those that a
diffusion model draws without guidance should.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import log_softmax, normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from draw_shapes import PARTIAL_TEMPLATES, PICTURE_SIZE, SYNONYMS, TEMPLATES, draw, words
from fit_shapes import Fit, Plan, spent_seconds
from judge_shapes import Caption, captions
from tokenizer_shapes import MAX_TOKENS, write_tokenizer

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# shapes-clip: a CLIP of {megabytes:.1f} MB that knows the shapes checkpoint's words and pictures

A CLIPModel with its tokenizer and its image processor, for `coreml-sd evaluate --clip` without internet:

    coreml-sd evaluate models --prompts prompts.txt -o out \\
        --clip tests/checkpoints/shapes-clip --features clip --reference-images pictures

Trained by `python tools/clip_shapes.py` {made} on one shared core, from nothing but
pictures that it draws itself. Float16 safetensors. Ours; Apache-2.0.

## Measured
On {count} pictures that are drawn anew: {right} have their own caption before the 209 others ({share:.1f} %).
The CLIP score (100 times the cosine, at least 0) is {own:.1f} on average with the own caption, {other:.1f} with the
others.
"""
OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "checkpoints" / "shapes-clip"
BATCH = 64
SPOILT = 16
FULL_SHARE = 0.7  # of the texts, the others leave something out
MOST_NOISE, MOST_BLUR = 12.0, 0.8  # of 255; pixels: what an autoencoder does to a picture
LARGEST_SCALE = 100.0  # CLIP's own limit
DRAWN_SEED = 77_000_000  # of the pictures that it is measured with
DRAWN_PER_CAPTION = 5


def build(vocabulary: int) -> CLIPModel:
    """An untrained one: 8 x 8 patches of (3, 64, 64), three layers of 64; two for texts."""
    end = vocabulary - 1
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": PICTURE_SIZE,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def build_processor() -> CLIPImageProcessor:
    """CLIP's, for pictures of the shapes checkpoint's size."""
    return CLIPImageProcessor(size={"shortest_edge": PICTURE_SIZE}, crop_size=PICTURE_SIZE)


def describe(caption: Caption, random: Random) -> tuple[str, frozenset[str]]:
    """The caption as someone might type it, and which of its features the text tells."""
    if random.random() < FULL_SHARE / 2:
        return caption.text, frozenset(("size", "color", "shape", "background"))
    template = random.choice(TEMPLATES if random.random() < FULL_SHARE else PARTIAL_TEMPLATES)
    told = frozenset(name for name in ("size", "color", "shape", "background") if f"{{{name}}}" in template)
    chosen = {name: random.choice(SYNONYMS.get(word, (word,))) for name, word in vars(caption).items()}
    return template.format(**{**chosen, "background": caption.background}), told


def roughen(pictures: list[Image.Image], random: Random) -> Tensor:
    """Drawn pictures as an autoencoder might give them back, (pictures, 3, height, width) in 0..255: a little blur,
    a little noise."""
    blurred = [one.filter(ImageFilter.GaussianBlur(random.uniform(0, MOST_BLUR))) for one in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in blurred])).permute(0, 3, 1, 2).float()
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    strength = MOST_NOISE * torch.rand((len(pictures), 1, 1, 1), generator=generator)
    return pixels + strength * torch.randn(pixels.shape, generator=generator)


@dataclass(frozen=True)
class Batch:
    """``fits`` (texts, pictures): whether a picture shows what a text tells."""

    pictures: Tensor
    texts: list[str]
    fits: Tensor


def draw_batch(random: Random, known: list[Caption]) -> Batch:
    """Pictures (BATCH + SPOILT, 3, 64, 64) in 0..255, of different captions; the last ones are mixtures."""
    chosen = random.sample(known, BATCH)
    drawn = [Image.fromarray(draw(caption, random)) for caption in chosen]
    pairs = [random.sample(drawn, 2) for _ in range(SPOILT)]
    drawn += [Image.blend(one, other, random.uniform(0.3, 0.7)) for one, other in pairs]
    told = [describe(caption, random) for caption in chosen]
    fits = [
        [all(getattr(one, name) == getattr(caption, name) for name in names) for one in chosen] + [False] * SPOILT
        for caption, (_, names) in zip(chosen, told, strict=True)
    ]
    return Batch(roughen(drawn, random), [text for text, _ in told], torch.tensor(fits))


def contrast(similarity: Tensor, fits: Tensor) -> Tensor:
    """CLIP's loss of (texts, pictures), where several pictures may fit a text."""
    forth = -(log_softmax(similarity, 1) * fits).sum(1) / fits.sum(1)
    own = fits.any(0)
    back = -(log_softmax(similarity, 0) * fits).sum(0)[own] / fits.sum(0)[own]
    return (forth.mean() + back.mean()) / 2


def train(plan: Plan, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Train until the plan is carried out."""
    torch.manual_seed(plan.seed)
    model = build(len(tokenizer))
    processor = build_processor()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    known = captions()

    def loss(generator: torch.Generator) -> Tensor:
        batch = draw_batch(Random(int(torch.randint(2**31, (1,), generator=generator))), known)
        tokens = tokenizer(batch.texts, padding=True, return_tensors="pt")
        pixels = (batch.pictures / 255.0 - mean) / deviation
        result = model(**tokens, pixel_values=pixels)
        scale = model.logit_scale.exp().clamp(max=LARGEST_SCALE)
        return contrast(scale * normalize(result.text_embeds) @ normalize(result.image_embeds).T, batch.fits)

    fit = Fit(plan, [model])
    fit.run(loss)
    fit.use_average()
    return model


def write(folder: Path, model: CLIPModel, tokenizer_folder: Path) -> None:
    """Write what CLIPModel, CLIPTokenizer and CLIPImageProcessor load."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").chmod(0o644)


@torch.no_grad()
def measure(folder: Path, made: str) -> str:
    """The card of the CLIP in ``folder``, with what it makes of pictures that are drawn anew."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    known, random = captions(), Random(DRAWN_SEED)
    tokens = tokenizer([caption.text for caption in known], padding=True, return_tensors="pt")
    texts = normalize(model.get_text_features(**tokens).pooler_output)
    own, other, right = [], [], 0
    for index, caption in enumerate(known):
        drawn = [Image.fromarray(draw(caption, random)) for _ in range(DRAWN_PER_CAPTION)]
        pixels = processor(drawn, return_tensors="pt").pixel_values
        scores = 100 * (normalize(model.get_image_features(pixels).pooler_output) @ texts.T).clamp(min=0)
        right += int((scores.argmax(1) == index).sum())
        own.append(float(scores[:, index].mean()))
        other.append(float((scores.sum(1) - scores[:, index]).mean()) / (len(known) - 1))
    count = len(known) * DRAWN_PER_CAPTION
    megabytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md") / 1e6
    return CARD.format(
        megabytes=megabytes,
        made=made,
        count=f"{count:,}",
        right=f"{right:,}",
        share=100 * right / count,
        own=float(np.mean(own)),
        other=float(np.mean(other)),
    )


def main() -> None:
    """Read the command line, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="(%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for what a resumed run needs (OUTPUT.work)")
    parser.add_argument("--minutes", type=float, default=60.0, help="longest time to train (%(default)s)")
    parser.add_argument("--updates", type=int, default=4500, help="(%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the one that is there")
    options = parser.parse_args()
    if options.evaluate_only:
        print(measure(options.output, "before"))
        return
    work = options.work or options.output.with_suffix(".work")
    tokenizer = write_tokenizer(work / "tokenizer", words())
    plan = Plan("clip", options.updates, options.minutes * 60, options.rate, options.seed, work, 100, 0.99)
    model = train(plan, tokenizer)
    write(options.output, model, work / "tokenizer")
    card = measure(options.output, f"in {spent_seconds(plan):.0f} s")
    (options.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
