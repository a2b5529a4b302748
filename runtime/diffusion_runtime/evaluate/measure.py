"""What a sweep's pictures are worth: a row for each set of models at each guidance scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion_runtime.evaluate import pictures
from diffusion_runtime.evaluate.distances import FEWEST, NORMAL_95, Distance, distance, floor
from diffusion_runtime.evaluate.networks import Clip, Features, all_of
from diffusion_runtime.evaluate.pictures import Difference, Made
from diffusion_runtime.evaluate.sweep import Sweep


@dataclass(frozen=True, slots=True)
class Row:
    """``pictures`` were made, of which ``flagged`` are in no other number. The CLIP score is the mean of
    100 x the cosine, at least 0, and ``clip_score_error`` half of its 95 % interval. Distances and their floors are
    None where pictures are too few, or where the models are the reference themselves; ``psnr_db`` and
    ``identical`` compare with the first models' pictures."""

    models: str
    guidance_scale: float
    pictures: int
    flagged: int
    clip_score: float | None = None
    clip_score_error: float | None = None
    frechet_distance: float | None = None
    frechet_floor: float | None = None
    kid: float | None = None
    kid_low: float | None = None
    kid_high: float | None = None
    kid_floor: float | None = None
    psnr_db: float | None = None
    identical: int | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """Features (pictures, width) that are not the models' own, and what they are from themselves."""

    features: Tensor
    floor: Distance | None


@dataclass(slots=True)
class Measurement:
    """``reference`` is None where the first models' pictures are it."""

    sweep: Sweep
    clip: Clip
    features: Features
    reference: Reference | None = None
    width: int = 0
    fewest: int = 0

    def rows(self) -> Iterator[Row]:
        """One after the other, once all pictures are there. Raises InputError for pictures that cannot be read."""
        texts: dict[str, Tensor] = {}
        for scale in self.sweep.scales:
            made = {name: pictures.of_batch(self.sweep.folder(name, scale)) for name in self.sweep.models}
            unread = list(
                dict.fromkeys(one.prompt for of in made.values() for one in of if one.prompt not in texts)
            )
            if unread:
                texts.update(zip(unread, self.clip.read(unread), strict=True))
            yield from self._at(scale, made, texts)

    def _at(self, scale: float, made: Mapping[str, Sequence[Made]], texts: Mapping[str, Tensor]) -> Iterator[Row]:
        first, *_ = made
        reference = self.reference
        for name, of in made.items():
            shown = [one for one in of if not one.flagged]
            seen = self._see(shown, self.features)
            if seen is not None:
                self._count(seen, reference)
            far = None if reference is None or seen is None else distance(reference.features, seen)
            yield _row(
                (name, scale, len(of), len(of) - len(shown)),
                self._scores(shown, texts),
                far,
                None if far is None or reference is None else reference.floor,
                None if name == first else pictures.paired(made[first], of),
            )
            if reference is None and seen is not None:
                reference = Reference(seen, floor(seen))

    def _see(self, shown: Sequence[Made], by: Features) -> Tensor | None:
        if not shown:
            return None
        return all_of(by.see, pictures.load([one.path for one in shown], "picture"))

    def _count(self, seen: Tensor, reference: Reference | None) -> None:
        fewest = len(seen) if reference is None else min(len(seen), len(reference.features))
        self.width, self.fewest = seen.shape[1], min(fewest, self.fewest or fewest)

    def _scores(self, shown: Sequence[Made], texts: Mapping[str, Tensor]) -> Tensor | None:
        if not shown:
            return None
        seen = all_of(self.clip.see, pictures.load([one.path for one in shown], "picture"))
        return 100 * (seen * torch.stack([texts[one.prompt] for one in shown])).sum(1).clamp(min=0)

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """What the numbers of ``rows``, all there are, are not good for."""
        if self.fewest < FEWEST:
            return [f"{self.fewest} pictures in a set: too few for a distance, which needs at least {FEWEST}"]
        found = []
        if self.fewest <= self.width:
            found.append(
                f"{self.fewest} pictures in a set, {self.width} features: so few make the Fréchet distance too "
                "large; it means nothing alone: compare it with the floor and with the other rows, or read KID"
            )
        distances = [(row.frechet_distance, row.frechet_floor) for row in rows]
        below = sum(far is not None and near is not None and far <= near for far, near in distances)
        if below:
            found.append(
                f"{below} of {len(rows)} Fréchet distances are not above the floor: with so few pictures they "
                "cannot be told from the reference, nor from each other"
            )
        return found


def look_at(folder: Path, features: Features) -> Reference:
    """The pictures of a folder as a reference. Raises InputError where there are none, or one cannot be read."""
    files = pictures.reference_files(folder)
    seen = all_of(features.see, pictures.load(files, "reference picture"))
    return Reference(seen, floor(seen))


def _row(
    what: tuple[str, float, int, int],
    scores: Tensor | None,
    far: Distance | None,
    near: Distance | None,
    difference: Difference | None,
) -> Row:
    error = None if scores is None or len(scores) < 2 else NORMAL_95 * float(scores.std()) / len(scores) ** 0.5
    row = Row(*what, clip_score=None if scores is None else float(scores.mean()), clip_score_error=error)
    if far is not None:
        row = replace(row, frechet_distance=far.frechet, kid=far.kid, kid_low=far.kid_low, kid_high=far.kid_high)
    if near is not None:
        row = replace(row, frechet_floor=near.frechet, kid_floor=near.kid)
    if difference is not None:
        row = replace(row, psnr_db=difference.psnr_db, identical=difference.identical)
    return row
