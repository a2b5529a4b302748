"""Golden values of pictures: PNG files of every colour type, bit depth and interlacing, as `images.load` reads
them; and the same picture in other sizes, as Pillow and torch make them."""

from __future__ import annotations

import base64
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from diffusion_runtime import images
from diffusion_runtime.safety import clip_input

WIDTH, HEIGHT = 13, 9
KINDS = ((0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16)))
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
SIZES = ((13, 9), (5, 4), (40, 31), (13, 20), (7, 9), (64, 64))


def values() -> dict[str, Any]:
    return {
        "files": list(_files()),
        "resized": list(_resized()),
        "depths": list(_depths()),
        "clips": list(_clips()),
    }


def _files() -> Iterator[dict[str, Any]]:
    drawn = np.random.default_rng(3)
    for kind, depths in KINDS:
        for depth in depths:
            for is_interlaced in (False, True):
                samples = drawn.integers(0, 1 << depth, (HEIGHT, WIDTH, CHANNELS[kind]))
                yield _case(f"type {kind}, {depth} bits", png(samples, kind, depth, is_interlaced))
    turned = drawn.integers(0, 256, (HEIGHT, WIDTH, 3))
    for orientation in range(1, 9):
        yield _case(f"orientation {orientation}", png(turned, 2, 8, False, orientation))


def _case(name: str, file: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        path.write_bytes(file)
        picture, mask, depths = (images.load(path, mode=mode) for mode in ("RGB", "L", "F"))
    return {
        "name": name,
        "file": _text(file),
        "width": picture.width,
        "height": picture.height,
        "picture": _text(picture.tobytes()),
        "mask": _text(mask.tobytes()),
        "depths": _text(np.asarray(depths, "<f4").tobytes()),
    }


def png(samples: np.ndarray, kind: int, depth: int, is_interlaced: bool, orientation: int = 1) -> bytes:
    """A PNG file of (height, width, channels) samples. The rows take the five filters in turn."""
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(is_interlaced))
    parts = [
        samples[top::down, left::right] for left, top, right, down in (PASSES if is_interlaced else [(0, 0, 1, 1)])
    ]
    data = b"".join(_rows(part, depth, channels) for part in parts if part.size)
    palette = bytes(np.random.default_rng(4).integers(0, 256, 3 << depth, np.uint8)) if kind == 3 else b""
    exif = struct.pack("<4sIHHHIHHI", b"II*\0", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    chunks = [(b"IHDR", header), (b"eXIf", exif if orientation > 1 else b""), (b"PLTE", palette)]
    half = len(zlib.compress(data)) // 2
    packed = zlib.compress(data, 9)
    chunks += [(b"IDAT", packed[:half]), (b"IDAT", packed[half:])]
    body = b"".join(_chunk(name, content) for name, content in chunks if content)
    return b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _rows(samples: np.ndarray, depth: int, channels: int) -> bytes:
    flat = samples.reshape(len(samples), -1)
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    else:
        bits = (flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    pixel = max(channels * depth // 8, 1)
    above = bytes(len(rows[0]))
    filtered = []
    for number, row in enumerate(rows):
        filtered.append(bytes([number % 5]) + _filtered(number % 5, row, above, pixel))
        above = row
    return b"".join(filtered)


def _filtered(kind: int, row: bytes, above: bytes, pixel: int) -> bytes:
    made = bytearray()
    for index, value in enumerate(row):
        left, up = (row[index - pixel] if index >= pixel else 0), above[index]
        corner = above[index - pixel] if index >= pixel else 0
        nearest = min((left, up, corner), key=lambda one: abs(left + up - corner - one))
        guess = (0, left, up, (left + up) // 2, nearest)[kind]
        made.append((value - guess) & 0xFF)
    return bytes(made)


def _resized() -> Iterator[dict[str, Any]]:
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    for width, height in SIZES:
        lanczos, bicubic = (
            picture.resize((width, height), how) for how in (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)
        )
        yield {
            "picture": _text(picture.tobytes()),
            "width": width,
            "height": height,
            "lanczos": _text(lanczos.tobytes()),
            "bicubic": _text(bicubic.tobytes()),
        }


def _clips() -> Iterator[dict[str, Any]]:
    """What the safety checker is fed, of a picture that is wide, high, or as large as that."""
    for width, height in ((40, 24), (24, 40), (16, 16)):
        values = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
        yield {
            "picture": _text(values.tobytes()),
            "width": width,
            "height": height,
            "side": 16,
            "input": _text(clip_input(Image.fromarray(values), 16).astype("<f4").tobytes()),
        }


def _depths() -> Iterator[dict[str, Any]]:
    depths = np.random.default_rng(6).normal(size=(HEIGHT, WIDTH)).astype(np.float32)
    for width, height in SIZES:
        small = interpolate(
            torch.from_numpy(depths)[None, None], (height, width), mode="bicubic", align_corners=False
        )
        yield {
            "depths": _text(depths.astype("<f4").tobytes()),
            "width": width,
            "height": height,
            "small": _text(small.numpy().astype("<f4").tobytes()),
        }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
