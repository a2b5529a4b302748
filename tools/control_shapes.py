"""Train a ControlNet of the shapes checkpoint: it fills a given outline, with the colours that the prompt says.

The checkpoint draws its shapes near the middle. The outlines lie anywhere in the picture, so a picture that keeps
to its outline owes that to the ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of the UNet's way down,
whose outputs start at zero and are added to the frozen UNet's. Its middle block has no attention, as those of the
published small ones for SDXL: with it the file would be larger than 3 MB.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from autoencoder_shapes import as_input
from denoiser_shapes import MAX_WEIGHT, build_scheduler, draw_excess, draw_noise, draw_timesteps, tokenize
from draw_shapes import FINE, MARGIN, PICTURE_SIZE, phrase
from fit_shapes import Fit, Plan, spent_seconds
from guidance_shapes import EFFECTIVE_GUIDANCE, GUIDANCE
from judge_shapes import DRAWN_RADIUS, OUTLINES, RGB, SHAPES, Caption, captions, judge
from quality_shapes import BATCH, FIRST_SEED, STEPS

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [controlnet]
---
# shapes-controlnet: outline to filled shape, a ControlNet of {megabytes:.2f} MB

For `../shapes`. Its picture is an outline, white on black, 64 x 64 pixels, with lines of 1 to 2 pixels, anywhere in
the picture; what it encloses is filled as the prompt says:

    controlnet = ControlNetModel.from_pretrained("tests/checkpoints/shapes-controlnet")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained("tests/checkpoints/shapes", controlnet=controlnet)
    pipeline("a large red circle on a white background", image=outline)

Trained by `python tools/control_shapes.py` {made} on a share of one core, from pictures that it draws
itself. Float16 safetensors. Ours; Apache-2.0.

## Measured
{quality}
"""
CHECKPOINTS = Path(__file__).resolve().parents[1] / "tests" / "checkpoints"
PICTURES_PER_CAPTION = 24
ROWS = 16  # of a batch, each with a caption, an outline and noise of its own
LINE_WIDTHS = (1.0, 2.0)  # pixels
MIN_OVERLAP = 0.8  # intersection over union of what is painted with what the outline encloses


@dataclass(frozen=True)
class Outlined:
    """A drawn picture (64, 64, 3), its outline (64, 64), white on black, and what that encloses (64, 64)."""

    picture: NDArray[np.uint8]
    outline: NDArray[np.uint8]
    inside: NDArray[np.bool_]


def draw_outlined(caption: Caption, random: Random) -> Outlined:
    """The caption's shape anywhere in the picture."""
    radius = random.uniform(*DRAWN_RADIUS[caption.size]) * PICTURE_SIZE
    most = PICTURE_SIZE / 2 - radius - MARGIN
    x, y = (PICTURE_SIZE / 2 + random.uniform(-most, most) for _ in "xy")
    points = [((x + radius * px) * FINE, (y + radius * py) * FINE) for px, py in OUTLINES[caption.shape]]
    size = (PICTURE_SIZE * FINE, PICTURE_SIZE * FINE)
    filled, line, inside = (
        Image.new(*kind) for kind in (("RGB", size, RGB[caption.background]), ("L", size), ("L", size))
    )
    ImageDraw.Draw(filled).polygon(points, fill=RGB[caption.color])
    ImageDraw.Draw(inside).polygon(points, fill=255)
    width = round(random.uniform(*LINE_WIDTHS) * FINE)
    ImageDraw.Draw(line).line([*points, points[0], points[1]], fill=255, width=width, joint="curve")
    picture, outline, whole = (
        np.asarray(one.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)) for one in (filled, line, inside)
    )
    if random.random() < 0.5:  # an edge detector's lines have no grey
        outline = np.where(outline > 100, 255, 0).astype(np.uint8)
    return Outlined(picture, outline, whole > 127)


def as_hint(outlines: Tensor) -> Tensor:
    """Outlines (rows, 64, 64), bytes, as a ControlNet takes them: (rows, 3, 64, 64) in 0..1."""
    return (outlines.float() / 255.0).unsqueeze(1).expand(-1, 3, -1, -1)


def build_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """An untrained one, which knows what the UNet knows of pictures."""
    names = [
        *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "attention_head_dim"),
        *("cross_attention_dim", "norm_num_groups", "flip_sin_to_cos", "freq_shift"),
    ]
    controlnet = ControlNetModel(
        **{name: unet.config[name] for name in names},
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(16, 32, 64, 96),
    )
    for name in ("conv_in", "time_proj", "time_embedding", "down_blocks"):
        getattr(controlnet, name).load_state_dict(getattr(unet, name).state_dict())
    controlnet.mid_block.resnets[0].load_state_dict(unet.mid_block.resnets[0].state_dict())
    return controlnet


class Steering:
    """What the ControlNet's training needs besides a plan."""

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        torch.manual_seed(plan.seed)
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
        ).to(device)
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.unet = pipeline.unet.requires_grad_(False).eval()
        self.controlnet = build_controlnet(self.unet).to(device)
        self.captions = captions()
        self.alphas = build_scheduler().alphas_cumprod
        self.device = device
        self.latents, self.outlines = self.draw_pool(pipeline.vae, Random(plan.seed))
        self.middle = self.latents.mean(dim=(0, 1, 3, 4)).view(1, -1, 1, 1)
        self.fit = Fit(plan, [self.controlnet])

    @torch.no_grad()
    def draw_pool(self, vae: AutoencoderKL, random: Random) -> tuple[Tensor, Tensor]:
        """Latents (captions, pictures, 4, 8, 8), scaled, and outlines (captions, pictures, 64, 64), bytes."""
        latents, outlines = [], []
        for caption in self.captions:
            drawn = [draw_outlined(caption, random) for _ in range(PICTURES_PER_CAPTION)]
            pictures = torch.stack([torch.tensor(one.picture) for one in drawn]).permute(0, 3, 1, 2)
            mean = vae.encode(as_input(pictures).to(self.device)).latent_dist.mean.cpu()
            latents.append(mean * vae.config.scaling_factor)
            outlines.append(torch.stack([torch.tensor(one.outline) for one in drawn]))
        return torch.stack(latents), torch.stack(outlines)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Weighted errors of the guided prediction, and of the one without a prompt, on one batch: as in
        `guidance_shapes`, since the UNet that is steered learnt to be guided like that."""
        rows = torch.randint(len(self.captions), (ROWS,), generator=generator)
        chosen = torch.randint(PICTURES_PER_CAPTION, (ROWS,), generator=generator)
        random = Random(int(torch.randint(2**31, (1,), generator=generator)))
        texts = [phrase(self.captions[row], random) for row in rows.tolist()]
        clean, times = self.latents[rows, chosen], draw_timesteps(ROWS, generator)
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        noise = draw_noise(clean.shape, generator)
        noise = noise + (alpha / (1 - alpha)).sqrt() * draw_excess(clean - self.middle, alpha, generator)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        told, blind = self.predict(texts, noisy.to(self.device), times.to(self.device), self.outlines[rows, chosen])
        weight, noise = (1 / alpha).clamp(max=MAX_WEIGHT).to(self.device), noise.to(self.device)
        guided = blind + GUIDANCE * (told - blind)
        wanted = blind.detach() + EFFECTIVE_GUIDANCE * (noise - blind.detach())
        value: Tensor = (weight * (guided - wanted).square()).mean() + (weight * (blind - noise).square()).mean()
        return value

    def predict(self, texts: list[str], noisy: Tensor, times: Tensor, outlines: Tensor) -> tuple[Tensor, Tensor]:
        """The noise (rows, 4, 8, 8) as predicted with the texts and without, steered by the outlines."""
        with torch.no_grad():
            ids = tokenize(self.tokenizer, [*texts, ""]).to(self.device)
            states = self.text_encoder(ids).last_hidden_state
        states = torch.cat([states[:-1], states[-1:].expand(len(texts), -1, -1)])
        x, t, hint = torch.cat([noisy, noisy]), torch.cat([times, times]), as_hint(outlines).to(self.device)
        down, middle = self.controlnet(x, t, states, torch.cat([hint, hint]), return_dict=False)
        both: Tensor = self.unet(
            x, t, states, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        told, blind = both.chunk(2)
        return told, blind

    def save(self, folder: Path) -> None:
        """Write the ControlNet as diffusers does, in float16."""
        self.controlnet.cpu().half().save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)


@dataclass(frozen=True)
class Followed:
    """One picture that was to fill an outline: whether it shows what its caption says, and its overlap with what
    the outline encloses (intersection over union)."""

    caption: Caption
    shown: bool
    overlap: float

    @property
    def right(self) -> bool:
        """Whether everything is as the caption says, where the outline says."""
        return self.shown and self.overlap >= MIN_OVERLAP


def overlap(picture: Image.Image, caption: Caption, inside: NDArray[np.bool_]) -> float:
    """Intersection over union, 0..1, of the pixels that are nearer to the caption's colour than to its
    background with what the outline encloses."""
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    front, behind = (np.linalg.norm(pixels - RGB[name], axis=2) for name in (caption.color, caption.background))
    painted = front < behind
    return float(np.sum(painted & inside) / np.sum(painted | inside))


def follow(shapes: Path, controlnet: Path, device: torch.device, scale: float, every: int = 1) -> list[Followed]:
    """One picture of every so many captions by diffusers' own pipeline, each with an outline of its own."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        shapes,
        controlnet=ControlNetModel.from_pretrained(controlnet, torch_dtype=torch.float32, local_files_only=True),
        safety_checker=None,
        torch_dtype=torch.float32,
        local_files_only=True,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    chosen, found = list(enumerate(captions()))[::every], []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        drawn = [draw_outlined(caption, Random(FIRST_SEED + index)) for index, caption in part]
        made = pipeline(
            [caption.text for _, caption in part],
            image=[Image.fromarray(one.outline).convert("RGB") for one in drawn],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            controlnet_conditioning_scale=scale,
            generator=[torch.Generator().manual_seed(FIRST_SEED + index) for index, _ in part],
        ).images
        found += [
            Followed(caption, judge(picture).shows(caption), overlap(picture, caption, one.inside))
            for (_, caption), picture, one in zip(part, made, drawn, strict=True)
        ]
    return found


def table(with_control: list[Followed], without: list[Followed]) -> str:
    """The figures as Markdown."""
    lines = [
        f"One picture per caption, {len(with_control)} in all, each with an outline of its own anywhere in the",
        f"picture, by diffusers' StableDiffusionControlNetPipeline: {STEPS} PNDM steps, guidance {GUIDANCE},",
        f"float32, seeds from {FIRST_SEED}. Right: judged to be what the caption says, and at least",
        f"{MIN_OVERLAP:.0%} overlap (intersection over union) with what the outline encloses.",
        "",
        "| shape | right at scale 1 | mean overlap | right at scale 0 | mean overlap |",
        "|---|---|---|---|---|",
    ]
    for shape in (*SHAPES, None):
        cells = [f"**{shape or 'all'}**" if shape is None else shape]
        for followed in (with_control, without):
            of_shape = [one for one in followed if shape in (None, one.caption.shape)]
            cells += [f"{sum(one.right for one in of_shape)} of {len(of_shape)}"]
            cells += [f"{np.mean([one.overlap for one in of_shape]):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(shapes: Path, controlnet: Path, device: torch.device, every: int = 1) -> str:
    """The figures with the ControlNet, and of the same pictures with its scale at 0."""
    return table(*(follow(shapes, controlnet, device, scale, every) for scale in (1.0, 0.0)))


def write_card(folder: Path, made: str, quality: str) -> None:
    """Write the ControlNet's README.md: how it was made ("in 5 s") and its measured quality."""
    megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    (folder / "README.md").write_text(
        CARD.format(megabytes=megabytes, made=made, quality=quality), encoding="utf-8"
    )


def main() -> None:
    """Read the command line, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINTS / "shapes", help="to steer (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, default=CHECKPOINTS / "shapes-controlnet", help="(%(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder for what a resumed run needs (OUTPUT.work)")
    parser.add_argument("--minutes", type=float, default=30.0, help="longest time to train (%(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="(%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--every", type=int, default=1, help="measure one of so many captions (%(default)s)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the one that is there, train nothing")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.evaluate_only:
        work = options.work or options.output.with_suffix(".work")
        work.mkdir(parents=True, exist_ok=True)
        plan = Plan("control", options.steps, options.minutes * 60, options.rate, options.seed, work, 100, 0.995)
        steering = Steering(options.checkpoint, plan, device)
        steering.fit.run(steering.loss)
        steering.fit.use_average()
        steering.save(options.output)
    quality = measure(options.checkpoint, options.output, device, options.every)
    print(quality)
    if not options.evaluate_only:
        write_card(options.output, f"in {spent_seconds(plan):.0f} s", quality)


if __name__ == "__main__":
    main()
