"""Draws what a caption says, and says it in other words: all that the shapes checkpoint ever learns from.

As a command, it writes captions and pictures of them for `coreml-sd evaluate`:

    python tools/draw_shapes.py shapes-drawn --every 3 --pictures 3
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from judge_shapes import BACKGROUNDS, COLORS, DRAWN_RADIUS, OUTLINES, RGB, SHAPES, SIZES, Caption, captions

PICTURE_SIZE = 64  # pixels
FINE = 4  # drawn this many times larger, then averaged
MARGIN = 3.0  # pixels between a shape and the edge of the picture
MAX_SHIFT = 3.0  # pixels from the middle

SYNONYMS = {
    "large": ("large", "large", "big", "huge"),
    "small": ("small", "small", "little", "tiny"),
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "cross": ("cross", "cross", "cross", "plus"),
    "purple": ("purple", "purple", "purple", "violet"),
}
TEMPLATES = (
    "a {size} {color} {shape} on a {background} background",
    "{size} {color} {shape} on a {background} background",
    "a {color} {shape}, {size}, on a {background} background",
    "{color} {shape}, {size}, {background} background",
    "{size} {color} {shape}, {background} background",
    "a {size} {color} {shape} on {background}",
    "a {background} background with a {size} {color} {shape}",
    "{background} background, {size} {color} {shape}",
    "a picture of a {size} {color} {shape} on a {background} background",
    "a drawing of one {size} {shape} that is {color}, in front of a {background} background",
)
PARTIAL_TEMPLATES = (
    "a {size} {color} {shape}",
    "a {color} {shape}",
    "{color} {shape}",
    "a {shape}",
    "a {color} {shape} on a {background} background",
    "a {size} {shape} on a {background} background",
    "the {shape} is {color}",
)
FULL_SHARE, VARIANT_SHARE, DROPPED_SHARE = 0.45, 0.30, 0.10  # the rest of the captions leaves something out


def words() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    text = " ".join(TEMPLATES + PARTIAL_TEMPLATES + SHAPES + SIZES + COLORS + BACKGROUNDS)
    text += " " + " ".join(" ".join(others) for others in SYNONYMS.values())
    plain = "".join(letter if letter.isalpha() else " " for letter in text)
    return sorted(set(plain.split()))


def phrase(caption: Caption, random: Random) -> str:
    """The caption as someone might type it; nothing at all for one in ten, so that guidance can work."""
    kind = random.random()
    if kind < DROPPED_SHARE:
        return ""
    if kind < DROPPED_SHARE + FULL_SHARE:
        return caption.text
    full = kind < DROPPED_SHARE + FULL_SHARE + VARIANT_SHARE
    parts = {
        name: random.choice(SYNONYMS.get(word, (word,)))
        for name, word in (("size", caption.size), ("color", caption.color), ("shape", caption.shape))
    }
    template = random.choice(TEMPLATES if full else PARTIAL_TEMPLATES)
    return template.format(background=caption.background, **parts)


def draw(caption: Caption, random: Random) -> NDArray[np.uint8]:
    """A picture (64, 64, 3) of the caption, at a random place near the middle."""
    return draw_polygon(caption, RGB[caption.color], RGB[caption.background], random)


def draw_polygon(
    caption: Caption, front: tuple[int, int, int], behind: tuple[int, int, int], random: Random
) -> NDArray[np.uint8]:
    """The caption's shape and size in any two colours."""
    radius = random.uniform(*DRAWN_RADIUS[caption.size]) * PICTURE_SIZE
    shift = min(MAX_SHIFT, PICTURE_SIZE / 2 - radius - MARGIN)
    x, y = (PICTURE_SIZE / 2 + random.uniform(-shift, shift) for _ in "xy")
    canvas = Image.new("RGB", (PICTURE_SIZE * FINE, PICTURE_SIZE * FINE), behind)
    outline = [((x + radius * px) * FINE, (y + radius * py) * FINE) for px, py in OUTLINES[caption.shape]]
    ImageDraw.Draw(canvas).polygon(outline, fill=front)
    return np.asarray(canvas.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX))


def write_reference(folder: Path, every: int, pictures: int, seed: int) -> None:
    """Write captions.txt, one of so many captions on each line, and ``pictures`` PNG files of each to pictures/."""
    random, chosen = Random(seed), captions()[::every]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "captions.txt").write_text("".join(f"{caption.text}\n" for caption in chosen), encoding="utf-8")
    for index, caption in enumerate(chosen):
        for number in range(pictures):
            Image.fromarray(draw(caption, random)).save(folder / "pictures" / f"{index:03}-{number}.png")


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, help="one of so many captions (%(default)s)")
    parser.add_argument("--pictures", type=int, default=1, help="of each caption (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args()
    write_reference(options.folder, options.every, options.pictures, options.seed)


if __name__ == "__main__":
    main()
