"""How far apart two sets of pictures are, from their features: Fréchet distance (Heusel et al. 2017, arXiv
1706.08500) and KID (Bińkowski et al. 2018, arXiv 1801.01401), both torchmetrics'."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

FEWEST = 10
"""Pictures in a set: no distance is given of fewer."""
SUBSETS = 100
MOST_IN_SUBSET = 1000
NORMAL_95 = 1.96
SEED = 0
"""Of the random subsets and halves: the same pictures give the same numbers."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Of two sets: the Fréchet distance, and KID with its 95 % interval."""

    frechet: float
    kid: float
    kid_low: float
    kid_high: float


class _AsTheyAre(nn.Module):
    """torchmetrics' way to take features that are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def distance(reference: Tensor, made: Tensor) -> Distance | None:
    """Of features (pictures, width) each; None where a set has fewer than `FEWEST` pictures.

    KID is the mean over random halves of the smaller set: halves spread, to first order, as whole sets of that size
    would, so that their deviation gives the interval."""
    fewest = min(len(reference), len(made))
    if fewest < FEWEST:
        return None
    half = min(fewest // 2, MOST_IN_SUBSET)
    width = reference.shape[1]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that features are kept in memory
        frechet = FrechetInceptionDistance(feature=_AsTheyAre(width))
        kernel = KernelInceptionDistance(feature=_AsTheyAre(width), subsets=SUBSETS, subset_size=half)
    for metric in (frechet, kernel):
        metric.update(reference.double(), real=True)
        metric.update(made.double(), real=False)
    # torchmetrics draws its subsets by torch's own generator, which others use, too.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        mean, deviation = (float(value) for value in kernel.compute())
    reach = NORMAL_95 * deviation
    return Distance(float(frechet.compute()), mean, mean - reach, mean + reach)


def floor(reference: Tensor) -> Distance | None:
    """How far the reference is from itself: the distance of its two random halves; nothing nearer is told apart."""
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(SEED))
    half = len(reference) // 2
    return distance(reference[order[:half]], reference[order[half : 2 * half]])
