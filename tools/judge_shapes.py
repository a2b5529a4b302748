"""Says what a picture shows: the shape, its colour, its size and the background. Knows nothing of any model.

The words that captions are made of live here too, with what each one looks like, so that a test needs only this
file, NumPy and Pillow::

    from judge_shapes import captions, judge

    wrong = [caption.text for caption in captions() if not judge(draw(caption.text)).shows(caption)]

As a command, it counts the right pictures of folders that `coreml-sd batch` and `coreml-sd evaluate` have made::

    python tools/judge_shapes.py out/*/guidance-*
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from math import cos, pi, sin
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Mask = NDArray[np.bool_]
Point = tuple[float, float]

RGB: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (160, 40, 170),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
BACKGROUNDS = ("white", "black", "blue", "yellow")
SIZES = ("large", "small")

# Outlines as polygons, x to the right and y downwards, within -1..1.
OUTLINES: dict[str, tuple[Point, ...]] = {
    "circle": tuple((cos(pi * i / 32), sin(pi * i / 32)) for i in range(64)),
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)),
    "cross": tuple(
        (x, y)
        for quarter in range(4)
        for x, y in (
            ((-0.32, -1), (0.32, -1), (0.32, -0.32)),
            ((1, -0.32), (1, 0.32), (0.32, 0.32)),
            ((0.32, 1), (-0.32, 1), (-0.32, 0.32)),
            ((-1, 0.32), (-1, -0.32), (-0.32, -0.32)),
        )[quarter]
    ),
    "star": tuple(
        ((1.0, 0.45)[i % 2] * sin(pi * i / 5), 0.1 - (1.0, 0.45)[i % 2] * cos(pi * i / 5)) for i in range(10)
    ),
}
SHAPES = tuple(OUTLINES)
FLAGGED_SHAPE = "star"  # the one that the safety checker is trained to flag

# Width of a shape's box as a share of the picture's: what drawings keep to, and what is still read as that size.
DRAWN_RADIUS = {"large": (0.30, 0.36), "small": (0.17, 0.20)}
READ_WIDTH = {"large": (0.46, 0.85), "small": (0.20, 0.46)}

MAX_COLOR_DISTANCE = 90.0  # in RGB units of 0..255; the nearest two colours of the palette are 130 apart
MIN_OVERLAP = 0.70  # intersection over union of the picture's shape with the outline drawn into the same box
MAX_STRAY = 0.10  # area of everything else that is not background, as a share of the shape's
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Caption:
    """What a picture is to show."""

    shape: str
    color: str
    size: str
    background: str

    @property
    def text(self) -> str:
        """The caption in its usual form: "a large red circle on a white background"."""
        return f"a {self.size} {self.color} {self.shape} on a {self.background} background"


@dataclass(frozen=True)
class Judgement:
    """What a picture shows; "unknown" for whatever can't be told."""

    shape: str
    color: str
    size: str
    background: str

    def shows(self, caption: Caption) -> bool:
        """Whether shape, colour, size and background are all what the caption says."""
        return (self.shape, self.color, self.size, self.background) == (
            caption.shape,
            caption.color,
            caption.size,
            caption.background,
        )


def captions() -> list[Caption]:
    """Every combination, in a fixed order; a shape never has its background's colour."""
    return [
        Caption(shape, color, size, background)
        for shape, color, size, background in product(SHAPES, COLORS, SIZES, BACKGROUNDS)
        if color != background
    ]


def judge(image: Image.Image | NDArray[Any]) -> Judgement:
    """Judge a picture: a Pillow image, or an array (height, width, 3) of bytes or of floats in 0..1."""
    pixels = _pixels(image)
    ring = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    ring = np.concatenate([ring, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    behind = np.median(ring, axis=0)
    background = _color_name(behind, BACKGROUNDS)

    distance = np.linalg.norm(pixels - behind, axis=2)
    if distance.max() < MAX_COLOR_DISTANCE / 2:
        return Judgement(UNKNOWN, UNKNOWN, UNKNOWN, background)
    core = distance > 0.7 * np.quantile(distance, 0.98)
    front = np.median(pixels[core], axis=0)
    along = (pixels - behind) @ (front - behind) / np.sum((front - behind) ** 2)
    found = along > 0.5
    mask = _largest_part(found)
    color = _color_name(front, COLORS)

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    width = max((box[2] - box[0]) / mask.shape[1], (box[3] - box[1]) / mask.shape[0])
    size = next((name for name, (low, high) in READ_WIDTH.items() if low <= width < high), UNKNOWN)
    stray = np.sum(found & ~mask) / np.sum(mask)
    return Judgement(_shape_name(mask, box) if stray <= MAX_STRAY else UNKNOWN, color, size, background)


def _pixels(image: Image.Image | NDArray[Any]) -> NDArray[np.float64]:
    """As (height, width, 3) in 0..255."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), dtype=np.float64)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture is (height, width, 3), got {image.shape}")
    return image.astype(np.float64) * (1.0 if image.dtype == np.uint8 else 255.0)


def _color_name(rgb: NDArray[np.float64], names: tuple[str, ...]) -> str:
    """The nearest colour of the whole palette, if it is near and one of `names`."""
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in RGB.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if nearest in names and distances[nearest] <= MAX_COLOR_DISTANCE else UNKNOWN


def _largest_part(mask: Mask) -> Mask:
    """The largest 4-connected part of a mask (height, width)."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    largest: set[tuple[int, int]] = set()
    while left:
        part: set[tuple[int, int]] = set()
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            part.add((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge.extend(near)
        largest = max(largest, part, key=len)
    result = np.zeros_like(mask)
    result[tuple(np.array(sorted(largest)).T)] = True
    return result


def _shape_name(mask: Mask, box: tuple[int, int, int, int]) -> str:
    """The shape whose outline, stretched to the box (left, top, right, bottom), covers the mask best."""
    seen = mask[box[1] : box[3], box[0] : box[2]]
    overlaps = {}
    for name in SHAPES:
        whole = _stretched(name, seen.shape[0], seen.shape[1])
        overlaps[name] = float(np.sum(seen & whole) / np.sum(seen | whole))
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else UNKNOWN


def _stretched(shape: str, height: int, width: int, fine: int = 8) -> Mask:
    """The shape filling a (height, width) box."""
    points = np.array(OUTLINES[shape])
    points = (points - points.min(axis=0)) / np.ptp(points, axis=0) * (width * fine - 1, height * fine - 1)
    canvas = Image.new("L", (width * fine, height * fine))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) > 127


def count_right(folder: Path) -> tuple[int, int]:
    """Of a batch of captions in their usual form: how many pictures are right, and of how many."""
    known = {caption.text: caption for caption in captions()}
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    right = sum(judge(Image.open(folder / line["file"])).shows(known[line["input"]["prompt"]]) for line in lines)
    return right, len(lines)


def main() -> None:
    """Read the command line and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    for folder in parser.parse_args().folders:
        right, count = count_right(folder)
        print(f"{folder}: {right} of {count} right, {100 * right / count:.1f} %")


if __name__ == "__main__":
    main()
