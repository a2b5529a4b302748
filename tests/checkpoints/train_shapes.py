"""Train the shapes checkpoint: a whole Stable Diffusion 1.x, small enough to commit, from drawn pictures only.

Draws a pool of pictures, learns an autoencoder, then text encoder and UNet on its latents, then a safety checker;
writes a diffusers folder with fp16 weights; generates one picture per caption and prints how many are right. A
stopped run goes on where it stopped if it is given the same --work folder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from autoencoder_shapes import decode_pool, draw_pool, encode_pool, train_autoencoder
from checker_shapes import train_checker
from denoiser_shapes import Denoiser
from draw_shapes import words
from fit_shapes import Plan, spent_seconds
from folder_shapes import Parts, write_card, write_folder
from quality_shapes import measure
from tokenizer_shapes import write_tokenizer

DEFAULT_OUTPUT = Path(__file__).parent / "shapes"


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
    "autoencoder": Schedule(steps=2500, share=0.2, learning_rate=2e-3, average_decay=0.995),
    "denoiser": Schedule(steps=9000, share=0.75, learning_rate=1e-3, average_decay=0.999),
    "checker": Schedule(steps=1500, share=0.05, learning_rate=1e-3, average_decay=0.99),
}


def main() -> None:
    """Read the command line, train, save, measure."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.evaluate_only:
        print(measure(options.output, device).table())
        return
    work = options.work or options.output.with_suffix(".work")
    seconds = train(options.output, work, options.minutes, options.seed, device)
    made = f"in {seconds:.0f} s on {f'{options.threads} CPU cores' if device.type == 'cpu' else 'a GPU'}"
    quality = measure(options.output, device).table()
    write_card(options.output, made, quality)
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the folder, train nothing")
    return parser.parse_args()


def train(output: Path, work: Path, minutes: float, seed: int, device: torch.device) -> float:
    """Train everything, write the folder, and say how many seconds of training it took."""
    work.mkdir(parents=True, exist_ok=True)
    plans = {name: schedule.plan(name, minutes * 60, seed, work) for name, schedule in SCHEDULES.items()}
    pool = draw_pool(seed)
    vae = train_autoencoder(plans["autoencoder"], pool, device)
    latents = encode_pool(vae, pool, device)
    scale = 1.0 / float(latents.std())
    vae.register_to_config(scaling_factor=scale)
    tokenizer = write_tokenizer(work / "tokenizer", words())
    denoiser = Denoiser(tokenizer, plans["denoiser"], latents * scale, device)
    denoiser.fit.run(denoiser.loss)
    denoiser.fit.use_average()
    checker = train_checker(plans["checker"], decode_pool(vae, latents, device), device)
    write_folder(output, work / "tokenizer", Parts(vae, denoiser.text_encoder, denoiser.unet, checker))
    return sum(spent_seconds(plan) for plan in plans.values())


if __name__ == "__main__":
    main()
