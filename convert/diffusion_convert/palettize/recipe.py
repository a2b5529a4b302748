"""Bits per weight: chosen for the least damage at an average size, kept as JSON, tied to the package it is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion_convert.palettize.damage import Damage, measure_damage
from diffusion_convert.palettize.palettize_options import PER_TENSOR, PalettizeOptions, widths_for
from diffusion_convert.palettize.select import palettizable
from diffusion_runtime import strict_json
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.errors import InputError
from diffusion_runtime.mil.package import Package, open_package


class Recipe(BaseModel):
    """What a recipe file holds. ``sha256`` is the package's identity, ``bits`` maps weight names to bits; weights
    that it does not name are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    package: str
    sha256: str
    average_bits: float
    granularity: str = PER_TENSOR
    group_size: int = 16
    bits: Mapping[str, int] = Field(min_length=1)

    def options(self, package: Package) -> PalettizeOptions:
        """The options for ``package``. Raises InputError where the recipe was made for another."""
        found = package_identity(package)
        if found != self.sha256:
            raise InputError(
                f"{package.path}: the recipe was made for {self.package} with hash {self.sha256[:12]}…, this "
                f"package has {found[:12]}…; make a recipe for it with --target-bits and --save-recipe"
            )
        return self._for(self.bits)

    def options_by_name(self, package: Package) -> PalettizeOptions | None:
        """The options for the weights of ``package`` that the recipe names, whatever it was made for; None where it
        names none of them."""
        named = {name: self.bits[name] for name in palettizable(package, embeddings=True) if name in self.bits}
        return self._for(named) if named else None

    def _for(self, bits: Mapping[str, int]) -> PalettizeOptions:
        return PalettizeOptions(bits_by_weight=dict(bits), granularity=self.granularity, group_size=self.group_size)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Options with bits by weight, and what they were chosen from."""

    options: PalettizeOptions
    damage: Damage
    widths: Sequence[int]


def mix(path: Path, options: PalettizeOptions, target_bits: float) -> Mixed:
    """Bits for each weight of the package at ``path``, ``target_bits`` on average, for the least damage to its
    outputs. Raises InputError where the package's system has no such bits."""
    widths = widths_for(open_package(path))
    if not widths[0] <= target_bits <= widths[-1]:
        raise InputError(f"--target-bits {target_bits:g}: expected {widths[0]} to {widths[-1]}")
    damage = measure_damage(path, options, widths)
    return Mixed(replace(options, bits_by_weight=choose_bits(damage, target_bits, widths)), damage, widths)


def load_recipe(path: Path) -> Recipe:
    """Raises InputError where the file is missing or not a recipe."""
    data = strict_json.read(path, InputError)
    return strict_json.as_model(Recipe, data, str(path), "a palettization recipe", InputError)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as readable JSON; a write that fails leaves no partial file."""
    with unfinished_file(path) as unfinished:
        unfinished.write_text(json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def package_identity(package: Package) -> str:
    """A hash of the model and of its weights: every file below the folder that ``@model_path`` stands for."""
    digest = hashlib.sha256()
    for path in sorted(file for file in package.root.rglob("*") if file.is_file()):
        digest.update(f"{path.relative_to(package.root).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def choose_bits(damage: Damage, target_bits: float, candidates: Sequence[int]) -> dict[str, int]:
    """Bits per weight with the least expected damage whose average over elements does not exceed ``target_bits``.

    From the fewest bits on, the step with the largest fall of damage per added bit is taken that still fits. Steps
    go along the convex hull of each weight's damage, which makes this the optimum up to the last step's size.
    Raises InputError where ``target_bits`` is not between the least and the most of ``candidates``.
    """
    widths = sorted(candidates)
    if not widths[0] <= target_bits <= widths[-1]:
        raise InputError(f"target of {target_bits:g} bits: expected {widths[0]} to {widths[-1]}")
    chosen = dict.fromkeys(damage.sizes, widths[0])
    room = (target_bits - widths[0]) * sum(damage.sizes.values()) + 1e-6
    steps = [
        (gain / ((after - before) * damage.sizes[name]), name, before, after)
        for name, by_bits in damage.relative_error.items()
        for before, after, gain in _hull_steps(by_bits, widths)
    ]
    for _, name, before, after in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        added = (after - before) * damage.sizes[name]
        if chosen[name] == before and added <= room:
            chosen[name] = after
            room -= added
    return chosen


def expected_damage(damage: Damage, bits: Mapping[str, int]) -> float:
    """The expected energy of the outputs' error over the outputs' energy, of all weights together."""
    return sum(damage.relative_error[name][width] for name, width in bits.items())


def average_bits(damage: Damage, bits: Mapping[str, int]) -> float:
    """Bits per element."""
    return sum(width * damage.sizes[name] for name, width in bits.items()) / sum(damage.sizes[n] for n in bits)


def _hull_steps(by_bits: Mapping[int, float], widths: Sequence[int]) -> list[tuple[int, int, float]]:
    """(from bits, to bits, fall of damage) along the lower convex hull, from the fewest bits on."""
    steps: list[tuple[int, int, float]] = []
    at = widths[0]
    while wider := [width for width in widths if width > at]:
        falls = {width: (by_bits[at] - by_bits[width]) / (width - at) for width in wider}
        best = max(wider, key=falls.__getitem__)
        if falls[best] <= 0:
            break
        steps.append((at, best, by_bits[at] - by_bits[best]))
        at = best
    return steps
