"""A picture of what bits buy: expected PSNR of the outputs against the size of the weights, recipe by recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_convert.palettize.damage import Damage
from diffusion_convert.palettize.recipe import average_bits, choose_bits, expected_damage
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.errors import InstallationError

_STEPS = 4  # recipes per bit


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe's average bits, the palettized weights' size and the outputs' expected PSNR."""

    average_bits: float
    megabytes: float
    psnr_db: float


def candidate(damage: Damage, bits: Mapping[str, int]) -> Candidate:
    """What ``bits`` are expected to cost."""
    average = average_bits(damage, bits)
    error = expected_damage(damage, bits)
    psnr = 10 * math.log10(damage.peak_to_energy / error) if error else math.inf
    return Candidate(average, average * sum(damage.sizes.values()) / 8e6, psnr)


def uniform_candidates(damage: Damage, widths: Sequence[int]) -> list[Candidate]:
    """One bit width for all weights, for each of ``widths``."""
    return [candidate(damage, dict.fromkeys(damage.sizes, width)) for width in sorted(widths)]


def mixed_candidates(damage: Damage, widths: Sequence[int]) -> list[Candidate]:
    """Recipes for averages from the least to the most of ``widths``, four per bit."""
    low, high = min(widths), max(widths)
    targets = [low + step / _STEPS for step in range((high - low) * _STEPS + 1)]
    return [candidate(damage, choose_bits(damage, target, widths)) for target in targets]


def plot_recipes(
    damage: Damage, widths: Sequence[int], path: Path, title: str, chosen: Candidate | None = None
) -> None:
    """Write a PNG; ``chosen`` is marked. Raises InstallationError without matplotlib,
    StorageError for what the disk refuses."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InstallationError("--plot needs matplotlib: pip install 'coreml-sd[plot]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points, style in (
        ("mixed bits", mixed_candidates(damage, widths), "-"),
        ("one width", uniform_candidates(damage, widths), "o"),
    ):
        finite = [point for point in points if math.isfinite(point.psnr_db)]
        axes.plot([point.megabytes for point in finite], [point.psnr_db for point in finite], style, label=name)
    if chosen is not None:
        axes.plot([chosen.megabytes], [chosen.psnr_db], "*", markersize=14, label=f"{chosen.average_bits:.2f} bits")
    axes.set(xlabel="palettized weights, MB", ylabel="expected PSNR of the outputs, dB", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with unfinished_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)
