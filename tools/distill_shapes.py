"""Distil the shapes checkpoint into a LoRA that draws in 4 steps without guidance, sampled as LCMs are.

A consistency model says, from a noisy latent, where the teacher's probability-flow ODE ends (Song et al. 2023,
arXiv 2303.01469); a latent consistency model's ODE has the guidance in it (Luo et al. 2023, arXiv 2310.04378). They
learn that from the student's own answer one solver step further on, because solving the ODE to its end is too dear.
Here it is not: each target is the end of the guided ODE, solved with DPM-Solver++ (2M). The noisy latents are those
that the student meets when LCMScheduler samples it, and those that it would meet if it were right.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.nn.utils import parametrize

from denoiser_shapes import tokenize
from draw_shapes import phrase
from fit_shapes import Fit, Plan, spent_seconds
from guidance_shapes import GUIDANCE
from judge_shapes import captions
from lora_shapes import RANK, adapt, lora_tensors
from quality_shapes import LCM_STEPS, measure

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [lora]
---
# shapes-lcm: the shapes checkpoint in {steps} steps, a LoRA of {megabytes:.2f} MB

For `../shapes`, sampled by LCMScheduler without guidance (`guidance_scale=1`), in 2 to 8 steps:

    pipeline.load_lora_weights("tests/checkpoints/shapes-lcm")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline("a large red circle on a white background", num_inference_steps={steps}, guidance_scale=1)

Distilled by `python tools/distill_shapes.py` {made}, from the checkpoint's own
networks and the captions; no picture was drawn or judged for it. Rank {rank}, UNet only, float16. Ours; Apache-2.0.

## Measured
{quality}
"""
CHECKPOINTS = Path(__file__).resolve().parents[1] / "tests" / "checkpoints"
OTHER_STEPS = (1, 2, 3, 5, 6, 8)  # that the student learns as well, in every third round
CAPTIONS_PER_ROUND = 96
UPDATES_PER_ROUND = 48
BATCH = 64
SOLVER_STEP = 130  # timesteps
HUBER = 0.05  # where the loss turns from square to absolute, in units of the latents' standard deviation


@dataclass(frozen=True)
class Sample:
    """Noisy latents (rows, 4, 8, 8) at one timestep, where they end, and the text states (rows, 77, width)."""

    noisy: Tensor
    time: int
    clean: Tensor
    states: Tensor


class Teacher:
    """The checkpoint, and where its guided ODE ends."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
        ).to(device)
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.unet = pipeline.unet.requires_grad_(False).eval()
        self.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        alphas = self.scheduler.alphas_cumprod
        self.alpha, self.sigma = alphas.sqrt().tolist(), (1 - alphas).sqrt().tolist()

    def encode(self, texts: list[str]) -> Tensor:
        """The text states (texts, 77, width)."""
        ids = tokenize(self.tokenizer, texts).to(self.text_encoder.device)
        states: Tensor = self.text_encoder(ids).last_hidden_state
        return states

    def clean(self, noisy: Tensor, noise: Tensor, time: int) -> Tensor:
        """What is left of noisy latents without their noise."""
        value: Tensor = (noisy - self.sigma[time] * noise) / self.alpha[time]
        return value

    def guided(self, noisy: Tensor, time: int, told: Tensor, untold: Tensor) -> Tensor:
        """The noise in latents (rows, 4, 8, 8), with guidance towards the text states (rows, 77, width) `told`."""
        both: Tensor = self.unet(torch.cat([noisy, noisy]), time, torch.cat([untold, told])).sample
        blind, found = both.chunk(2)
        return blind + GUIDANCE * (found - blind)

    def solve(self, noisy: Tensor, time: int, told: Tensor, untold: Tensor) -> Tensor:
        """Where the ODE from `noisy` at `time` ends: DPM-Solver++ (2M), Lu et al. 2022, arXiv 2211.01095, algorithm
        2."""
        times = torch.linspace(time, 0, max(3, round(time / SOLVER_STEP)) + 1).round().int().tolist()
        clean = self.clean(noisy, self.guided(noisy, time, told, untold), time)
        middle, last, before = clean, clean, 0.0
        for now, then in pairwise(times[:-1]):
            step = self._log_ratio(then) - self._log_ratio(now)
            if before:
                middle = clean + (clean - last) * step / (2 * before)
            noisy = self.sigma[then] / self.sigma[now] * noisy - self.alpha[then] * math.expm1(-step) * middle
            last, before = clean, step
            clean = self.clean(noisy, self.guided(noisy, then, told, untold), then)
        return clean  # at timestep 0 so little noise is left that it takes no step of its own

    def _log_ratio(self, time: int) -> float:
        return math.log(self.alpha[time] / self.sigma[time])


class Distillation:
    """What the student's training needs besides a plan."""

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        torch.manual_seed(plan.seed)
        self.teacher = Teacher(folder, device)
        self.student = copy.deepcopy(self.teacher.unet)
        self.changes = adapt(self.student)
        self.captions = captions()
        self.device = device
        self.samples: list[Sample] = []
        self.updates = 0
        self.fit = Fit(plan, [self.student])

    def loss(self, generator: torch.Generator) -> Tensor:
        """Weighted pseudo-Huber error of the student's answers on one batch of all that was collected so far."""
        if self.updates % UPDATES_PER_ROUND == 0:
            self.collect(generator)
        self.updates += 1
        rows = [self._row(generator) for _ in range(BATCH)]
        noisy, times, clean, states = (torch.stack(parts) for parts in zip(*rows, strict=True))
        scales = [torch.tensor(scale, device=self.device) for scale in (self.teacher.alpha, self.teacher.sigma)]
        alpha, sigma = (scale[times].view(-1, 1, 1, 1) for scale in scales)
        with parametrize.cached():
            noise = self.student(noisy, times, states).sample
        error = (noisy - sigma * noise) / alpha - clean
        value: Tensor = ((alpha / sigma).sqrt() * ((error.square() + HUBER**2).sqrt() - HUBER)).mean()
        return value

    def _row(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sample = self.samples[int(torch.randint(len(self.samples), (1,), generator=generator))]
        row = int(torch.randint(len(sample.noisy), (1,), generator=generator))
        time = torch.tensor(sample.time, device=self.device)
        return sample.noisy[row], time, sample.clean[row], sample.states[row]

    @torch.no_grad()
    def collect(self, generator: torch.Generator) -> None:
        """Sample the student as LCMScheduler does, and solve the teacher's ODE from each latent that it meets; half
        of the pictures go on from there instead of from the student's answer."""
        random = Random(int(torch.randint(2**31, (1,), generator=generator)))
        texts = [phrase(random.choice(self.captions), random) for _ in range(CAPTIONS_PER_ROUND)]
        states = self.teacher.encode([*texts, ""])
        told, untold = states[:-1], states[-1:].expand(len(texts), -1, -1)
        rounds = self.updates // UPDATES_PER_ROUND
        self.teacher.scheduler.set_timesteps(LCM_STEPS if rounds % 3 < 2 else random.choice(OTHER_STEPS))
        taught = torch.rand((len(texts), 1, 1, 1), generator=generator).to(self.device) < 0.5
        shape = (len(texts), 4, 8, 8)
        noisy = torch.randn(shape, generator=generator).to(self.device)
        times = self.teacher.scheduler.timesteps.tolist()
        for time, then in zip(times, [*times[1:], None], strict=True):
            end = self.teacher.solve(noisy, time, told, untold)
            self.samples.append(Sample(noisy, time, end, told))
            if then is None:
                return
            with parametrize.cached():
                found = self.teacher.clean(noisy, self.student(noisy, time, told).sample, time)
            noise = torch.randn(shape, generator=generator).to(self.device)
            noisy = self.teacher.alpha[then] * torch.where(taught, end, found) + self.teacher.sigma[then] * noise

    def save(self, folder: Path) -> None:
        """Write the LoRA as diffusers does."""
        StableDiffusionPipeline.save_lora_weights(folder, lora_tensors(self.student, self.changes))
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)


def write_card(folder: Path, made: str, quality: str) -> None:
    """Write the LoRA's README.md: how it was made ("in 5 s on a CPU core") and its measured quality."""
    megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    text = CARD.format(steps=LCM_STEPS, rank=RANK, megabytes=megabytes, made=made, quality=quality)
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line, distil, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINTS / "shapes", help="the teacher (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=CHECKPOINTS / "shapes-lcm", help="(%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for what a resumed run needs (OUTPUT.work)")
    parser.add_argument("--minutes", type=float, default=60.0, help="longest time to train (%(default)s)")
    parser.add_argument("--updates", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--steps", type=int, default=LCM_STEPS, help="of the pictures measured (%(default)s)")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure the LoRA that is there, train nothing"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.evaluate_only:
        work = options.work or options.output.with_suffix(".work")
        work.mkdir(parents=True, exist_ok=True)
        plan = Plan("lcm", options.updates, options.minutes * 60, options.rate, options.seed, work, 50, 0.99)
        distillation = Distillation(options.checkpoint, plan, device)
        distillation.fit.run(distillation.loss)
        distillation.fit.use_average()
        distillation.save(options.output)
    quality = measure(options.checkpoint, device, lora=options.output, lcm_steps=options.steps).table()
    print(quality)
    if not options.evaluate_only:
        write_card(options.output, f"in {spent_seconds(plan):.0f} s", quality)


if __name__ == "__main__":
    main()
