"""One training loop for all networks: seeded, averaged over time, resumable, shared by several processes.

Every process runs the same loop on batches of its own and they average their gradients. On a CPU, two processes of
one thread each take half the time of one process with two threads, and bear other programs beside them far better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

Loss = Callable[[torch.Generator], Tensor]

SAVE_SECONDS = 60.0
REPORT_STEPS = 100
MAX_GRADIENT = 1.0  # norm


@dataclass(frozen=True)
class Plan:
    """How long and how fast one network is trained; it ends at `steps` or after `seconds`, whichever is first."""

    name: str
    steps: int
    seconds: float
    learning_rate: float
    seed: int
    work: Path
    warmup_steps: int = 100
    average_decay: float = 0.999

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the training that is over, 0..1."""
        return min(1.0, max(step / self.steps, elapsed / self.seconds))

    def rate(self, step: int, elapsed: float) -> float:
        """Learning rate: a short rise, then half a cosine down to 2 %."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        fall = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * self.progress(step, elapsed)))
        return self.learning_rate * rise * fall


def process() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def spent_seconds(plan: Plan) -> float:
    """Seconds of training that the plan's state on disk has behind it."""
    return float(torch.load(plan.work / f"{plan.name}.pt", weights_only=True)["elapsed"])


class Fit:
    """A running training: networks, optimiser, moving average of the weights, and where it stands."""

    def __init__(self, plan: Plan, networks: Sequence[nn.Module]) -> None:
        self.plan = plan
        self.networks = nn.ModuleList(networks)
        self.weights: list[Tensor] = [weight for weight in self.networks.parameters() if weight.requires_grad]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=plan.learning_rate, betas=(0.9, 0.99), fused=True)
        self.step = 0
        self.elapsed = 0.0
        self.path = plan.work / f"{plan.name}.pt"
        if self.path.exists():
            self._load()

    @property
    def done(self) -> bool:
        """Whether the plan has been carried out."""
        return self.plan.progress(self.step, self.elapsed) >= 1.0

    def run(self, loss: Loss) -> None:
        """Train until the plan is carried out, leaving the state on disk every minute and at the end."""
        saved = last = time.perf_counter()
        total = 0.0
        self.networks.train()
        while not self.done:
            now = time.perf_counter()
            self.elapsed, last = self.elapsed + now - last, now
            total += self._update(loss)
            if self.step % REPORT_STEPS == 0 and process()[0] == 0:
                rate = self.optimizer.param_groups[0]["lr"]
                print(
                    f"{self.plan.name}: step {self.step}/{self.plan.steps}, {self.elapsed:.0f} s, "
                    f"loss {total / REPORT_STEPS:.5f}, rate {rate:.2e}",
                    flush=True,
                )
                total = 0.0
            if now - saved > SAVE_SECONDS:
                self._save()
                saved = now
        self._save()

    def use_average(self) -> None:
        """Put the averaged weights into the networks, for good."""
        with torch.no_grad():
            for weight, average in zip(self.weights, self.average, strict=True):
                weight.copy_(average)
        self.networks.eval()

    def _update(self, loss: Loss) -> float:
        """One step; its randomness depends on seed, step and process only, so a resumed run draws the same."""
        rank, processes = process()
        generator = torch.Generator().manual_seed(self.plan.seed * 100_000_007 + self.step * processes + rank)
        value = loss(generator)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        self._share_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step, self.elapsed)
        self.optimizer.step()
        decay = min(self.plan.average_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, self.weights, 1.0 - decay)
        self.step += 1
        return float(value.detach())

    def _share_gradients(self) -> None:
        """Average the gradients, and the time spent, over the processes; then clip the gradients."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        elapsed = gradients[0].new_tensor([self.elapsed])
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), elapsed])
        _, processes = process()
        if processes > 1:
            distributed.all_reduce(flat)
            flat /= processes
            self.elapsed = float(flat[-1])
        flat[:-1] *= min(1.0, MAX_GRADIENT / float(flat[:-1].norm()))
        parts = torch.split(flat[:-1], [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _save(self) -> None:
        if process()[0] != 0:
            return
        state = {
            "networks": self.networks.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.networks.load_state_dict(state["networks"])
        with torch.no_grad():
            for average, value in zip(self.average, state["average"], strict=True):
                average.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]
