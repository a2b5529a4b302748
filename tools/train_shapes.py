"""Train the shapes checkpoint: a whole Stable Diffusion 1.x, small enough to commit, from drawn pictures only.

Draws a pool of pictures, learns an autoencoder, then text encoder and UNet on its latents; writes a diffusers
folder with fp16 weights; then a safety checker, on what these draw; generates one picture per caption and prints
how many are right. A stopped run goes on where it stopped if it is given the same --work folder.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from autoencoder_shapes import draw_pool, encode_pool, train_autoencoder, train_decoder
from checker_shapes import build_checker, calibrate, make_pictures, train_checker
from denoiser_shapes import Denoiser
from draw_shapes import words
from fit_shapes import Plan, process, spent_seconds
from folder_shapes import Parts, write_card, write_checker, write_folder
from guidance_shapes import Guidance
from quality_shapes import measure
from tokenizer_shapes import write_tokenizer

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "checkpoints" / "shapes"


@dataclass(frozen=True)
class Schedule:
    """Steps, share of the minutes, and learning rate of one training."""

    steps: int
    share: float
    learning_rate: float
    average_decay: float

    def plan(self, name: str, seconds: float, seed: int, work: Path) -> Plan:
        """The plan of the training with that name."""
        return Plan(
            name, self.steps, self.share * seconds, self.learning_rate, seed, work, average_decay=self.average_decay
        )


SCHEDULES = {
    "autoencoder": Schedule(steps=1220, share=0.14, learning_rate=2e-3, average_decay=0.995),
    "denoiser": Schedule(steps=6200, share=0.50, learning_rate=1e-3, average_decay=0.999),
    "guidance": Schedule(steps=1400, share=0.18, learning_rate=4e-4, average_decay=0.995),
    "decoder": Schedule(steps=700, share=0.05, learning_rate=1e-3, average_decay=0.995),
    "checker": Schedule(steps=6300, share=0.13, learning_rate=1.5e-3, average_decay=0.99),
}


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    output: Path
    work: Path
    seconds: float
    seed: int
    processes: int
    device: torch.device

    @property
    def hardware(self) -> str:
        """What it runs on, in words."""
        return f"{self.processes} CPU cores" if self.device.type == "cpu" else "a GPU"

    def plans(self) -> dict[str, Plan]:
        """One per training."""
        return {name: one.plan(name, self.seconds, self.seed, self.work) for name, one in SCHEDULES.items()}


def main() -> None:
    """Read the command line, train, save, measure."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.evaluate_only:
        print(measure(options.output, device).table())
        return
    job = Job(
        output=options.output,
        work=options.work or options.output.with_suffix(".work"),
        seconds=options.minutes * 60,
        seed=options.seed,
        processes=1 if device.type == "cuda" else options.processes,
        device=device,
    )
    job.work.mkdir(parents=True, exist_ok=True)
    if options.checker_only:
        add_checker(job)
        print(measure(job.output, device).table())
        return
    if job.processes > 1:
        spawn(train_one_of, (job,), nprocs=job.processes)  # type: ignore[no-untyped-call]
    else:
        train(job)
    add_checker(job)
    made = f"in {sum(map(spent_seconds, job.plans().values())):.0f} s on {job.hardware}"
    quality = measure(job.output, device).table()
    write_card(job.output, made, quality)
    print(f"Made {made}.\n\n{quality}")


def parse() -> argparse.Namespace:
    """The options; --help says what they do."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Examples: `train_shapes.py -o /tmp/shapes --minutes 10` for a rough one in ten minutes; "
        "`train_shapes.py --evaluate-only` to measure the committed one.",
    )
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for what a resumed run needs (OUTPUT.work)")
    parser.add_argument("--minutes", type=float, default=150.0, help="longest time to train (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=torch.get_num_threads(), help="that share the work (%(default)s)"
    )
    parser.add_argument("--checker-only", action="store_true", help="train the folder's checker anew, no more")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the folder, train nothing")
    return parser.parse_args()


def train_one_of(rank: int, job: Job) -> None:
    """What one of several processes does."""
    torch.set_num_threads(1)
    meeting = (job.work / f"meeting-{os.getppid()}").resolve().as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=job.processes)
    train(job)
    distributed.destroy_process_group()


def train(job: Job) -> None:
    """Train everything but the checker, and write the folder."""
    plans, device = job.plans(), job.device
    pool = draw_pool(job.seed)
    vae = train_autoencoder(plans["autoencoder"], pool, device)
    latents = encode_pool(vae, pool, device)
    scale = 1.0 / float(latents.std())
    vae.register_to_config(scaling_factor=scale)
    tokenizer = write_tokenizer(job.work / f"tokenizer-{process()[0]}", words())
    denoiser = Denoiser(tokenizer, plans["denoiser"], latents * scale, device)
    denoiser.fit.run(denoiser.loss)
    denoiser.fit.use_average()
    guidance = Guidance(denoiser, plans["guidance"])
    guidance.fit.run(guidance.loss)
    guidance.fit.use_average()
    train_decoder(plans["decoder"], vae, pool, latents, device)
    if process()[0] == 0:
        parts = Parts(vae, denoiser.text_encoder, denoiser.unet, build_checker())
        write_folder(job.output, job.work / "tokenizer-0", parts)


def add_checker(job: Job) -> None:
    """Train the safety checker of the folder that is there on what its other networks draw, and write it."""
    pictures = make_pictures(job.output, job.work / "pictures.pt", job.seed, job.device)
    checker = train_checker(job.plans()["checker"], pictures.learnt(), job.device)
    print(f"thresholds: {calibrate(checker, pictures.held_out(), job.device)}")
    write_checker(job.output, checker)


if __name__ == "__main__":
    main()
