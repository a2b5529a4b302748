"""What to palettize with how many bits, and the report of what was done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffusion_convert.palettize.select import Weight, palettizable
from diffusion_runtime.bundle.manifest import Palettization
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import PALETTE_BITS
from diffusion_runtime.mil.package import Package

PER_TENSOR = "per-tensor"
PER_GROUPED_CHANNEL = "per-grouped-channel"
_IOS16_OPSET = 6
_IOS18_OPSET = 8


@dataclass(frozen=True, slots=True)
class PalettizeOptions:
    """How to palettize. ``bits_by_weight`` (a recipe) names weights and their bits, others are kept; where it is
    None every weight that can be palettized gets ``bits``. Groups need iOS 18, as 3 bits do."""

    bits: int = 6
    bits_by_weight: Mapping[str, int] | None = None
    granularity: str = PER_TENSOR
    group_size: int = 16
    embeddings: bool = False

    def __post_init__(self) -> None:
        for name, bits in {"--nbits": self.bits, **(self.bits_by_weight or {})}.items():
            if bits not in PALETTE_BITS:
                raise InputError(f"{name}: {bits} bits, expected one of {', '.join(map(str, PALETTE_BITS))}")
        if self.granularity not in (PER_TENSOR, PER_GROUPED_CHANNEL):
            raise InputError(f"granularity {self.granularity!r}: expected {PER_TENSOR} or {PER_GROUPED_CHANNEL}")
        if self.group_size < 1:
            raise InputError(f"group size {self.group_size}: expected at least 1")


@dataclass(frozen=True, slots=True)
class WeightReport:
    """One palettized weight, as decompressed from the file that was written."""

    name: str
    shape: tuple[int, ...]
    bits: int
    snr_db: float
    squared_error: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Report:
    """What was done: weights in the program's order, and both packages' sizes."""

    weights: tuple[WeightReport, ...]
    options: PalettizeOptions
    bytes_before: int
    bytes_after: int

    def worst(self, count: int = 10) -> tuple[WeightReport, ...]:
        """The weights with the lowest signal-to-noise ratio."""
        return tuple(sorted(self.weights, key=lambda weight: weight.snr_db)[:count])

    @property
    def average_bits(self) -> float:
        """Bits per element over the palettized weights."""
        return sum(weight.bits * weight.size for weight in self.weights) / sum(w.size for w in self.weights)

    @property
    def palettization(self) -> Palettization:
        """The entry of the manifest."""
        grouped = self.options.granularity == PER_GROUPED_CHANNEL
        return Palettization(
            nbits=round(self.average_bits, 4),
            granularity=self.options.granularity.replace("-", "_"),
            group_size=self.options.group_size if grouped else None,
            worst_snr_db=round(min(200.0, self.worst(1)[0].snr_db), 2),
            bits_by_weight={weight.name: weight.bits for weight in self.weights},
        )


def chosen_weights(package: Package, options: PalettizeOptions) -> dict[str, tuple[Weight, int]]:
    """The weights of ``package`` that are palettized, with their bits. Raises InputError where it cannot."""
    weights = palettizable(package, options.embeddings or options.bits_by_weight is not None)
    if options.bits_by_weight is None:
        chosen = {name: (weight, options.bits) for name, weight in weights.items()}
    else:
        if unknown := sorted(set(options.bits_by_weight) - set(weights)):
            raise InputError(
                f"{package.path}: the recipe names {len(unknown)} weights that are not there or cannot be "
                f"palettized: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}"
            )
        chosen = {name: (weights[name], bits) for name, bits in options.bits_by_weight.items()}
        if not chosen:
            raise InputError(f"{package.path}: the recipe names no weights")
    opset = _opset(package)
    needs_ios18 = [f"{bits} bits" for _, bits in chosen.values() if bits == 3]
    needs_ios18 += [PER_GROUPED_CHANNEL] if options.granularity == PER_GROUPED_CHANNEL else []
    if needs_ios18 and opset < _IOS18_OPSET:
        raise InputError(
            f"{package.path}: {needs_ios18[0]} needs a package for iOS 18 / macOS 15; "
            "convert with --target macOS15, or choose per-tensor and 1, 2, 4, 6 or 8 bits"
        )
    if opset < _IOS16_OPSET:
        raise InputError(f"{package.path}: palettized weights need a package for iOS 16 / macOS 13 or later")
    return chosen


def widths_for(package: Package) -> tuple[int, ...]:
    """The bit widths that the package's target has: 3 from iOS 18 on."""
    return tuple(bits for bits in PALETTE_BITS if bits != 3 or packs_by_type(package))


def packs_by_type(package: Package) -> bool:
    """True where indices are stored as iOS 18's unsigned types of few bits, False as iOS 16's packed bytes."""
    return _opset(package) >= _IOS18_OPSET


def _opset(package: Package) -> int:
    """The oldest operation set among the program's functions, as a number (6: iOS 16, 8: iOS 18)."""
    names = {function.opset for function in package.model.program.functions.values()}
    numbers = [int(name.removeprefix("CoreML")) for name in names if name.removeprefix("CoreML").isdigit()]
    if len(numbers) < len(names) or not numbers:
        raise PackageError(f"{package.path}: unknown operation set in {sorted(names)}, expected CoreML5 or later")
    return min(numbers)
