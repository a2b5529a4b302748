"""Pictures in and out: PIL images to tensors as diffusers' VaeImageProcessor makes them, and PNG files."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageOps, PngImagePlugin, UnidentifiedImageError

from diffusion_runtime import strict_json
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.errors import InputError, StorageError

if TYPE_CHECKING:
    import torch

MAX_NAME = 255  # what the file systems of macOS and Linux take
MAX_PIXELS = 100_000_000  # 300 MB as RGB; larger than what phones and scanners make
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
DATA_URL = "data:"
METADATA_KEY = "coreml-sd"
OLD_METADATA_KEY = "coreml-diffusion"
"""What this project was called until version 0.1: pictures (and manifests) of that time name it, and are read."""


def load(path: Path, what: str = "image", mode: str = "RGB") -> Image.Image:
    """A picture file as RGB (or ``mode``: "L" for a mask, "F" for depths as they are), turned upright. The format
    is told by the content, not by the name. Raises InputError if it is not one of `FORMATS` or too large."""
    with _opened(path, what, formats()) as image:
        upright = ImageOps.exif_transpose(image)
        if mode == "F":
            return upright.convert("F")
        return grey(upright) if mode == "L" else in_bytes(upright).convert(mode)


def decode(data: bytes, what: str, mode: str = "RGB", most: int = MAX_PIXELS) -> Image.Image:
    """As `load`, from the bytes of a file of at most ``most`` pixels. ``mode`` "RGBA" keeps what is transparent."""
    with _decoded(io.BytesIO(data), what, FORMATS, most) as image:
        upright = ImageOps.exif_transpose(image)
        return grey(upright) if mode == "L" else in_bytes(upright).convert(mode)


def from_base64(text: str) -> bytes:
    """The bytes of a picture's file in base64, as it is or as a data URL. Raises ValueError for anything else."""
    data = text.partition(",")[2] if text.startswith(DATA_URL) else text
    return base64.b64decode("".join(data.split()), validate=True)


@contextmanager
def _opened(path: Path, what: str, kinds: tuple[str, ...]) -> Iterator[Image.Image]:
    """The decoded picture. Every error, of the block too, becomes an InputError that names the file."""
    check_name(path, what)
    with _decoded(path, f"{what} {path}", kinds, MAX_PIXELS) as image:
        yield image


@contextmanager
def _decoded(source: Path | BinaryIO, shown: str, kinds: tuple[str, ...], most: int) -> Iterator[Image.Image]:
    try:
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):  # a pipe would be waited for
            raise InputError("not a file")
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(source, formats=kinds)
        with image:
            if image.width * image.height > most:
                size = f"{image.width}x{image.height}"
                raise InputError(f"{size} pixels: expected at most {most // 10**6} million")
            image.load()
            yield image
    except FileNotFoundError:
        raise InputError(f"{shown}: no such file") from None
    except InputError as error:
        raise InputError(f"{shown}: {error}") from None
    except UnidentifiedImageError as error:
        raise InputError(f"{shown}: not a picture that can be read; expected one of {', '.join(kinds)}") from error
    except Exception as error:  # Pillow's decoders let through whatever they stumble on
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{shown}: damaged: {reason}") from error


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened: `FORMATS`, and HEIF where pillow-heif is installed. There are
    more that Pillow opens, some by other programs: Ghostscript for an EPS file, whatever it is called."""
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError:
        return FORMATS
    heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def check_name(path: Path, what: str) -> None:
    """Raise InputError for a path that is no Unicode or holds a NUL: no record and no message could name it."""
    text = str(path)
    if "\0" in text or (not text.isascii() and text.encode("utf-8", "ignore").decode() != text):
        raise InputError(f"{what} {text!r}: the name is not valid Unicode: rename it")


def in_bytes(image: Image.Image) -> Image.Image:
    """Pillow cuts 16-bit greys off at 255 where they become bytes; here they are scaled. Raises InputError for
    pictures of 32-bit numbers, whose scale nobody knows."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image.convert("I"), np.float32)
        return Image.fromarray((values / 257.0).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError("the picture is made of 32-bit numbers: expected 8 or 16 bits")
    return image


def grey(mask: Image.Image) -> Image.Image:
    """A mask in bytes. What is transparent marks nothing, whatever colour lies beneath."""
    scaled = in_bytes(mask)
    if "A" not in scaled.getbands():
        return scaled.convert("L")
    return ImageChops.multiply(scaled.convert("L"), scaled.getchannel("A"))


def to_tensor(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """float32 (1, 3, height, width) in -1..1; resized by Lanczos where the size differs."""
    import torch

    rgb = in_bytes(image).convert("RGB")
    resized = rgb if rgb.size == (width, height) else rgb.resize((width, height), Image.Resampling.LANCZOS)
    values = np.asarray(resized, np.float32) / 255.0
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous() * 2.0 - 1.0


def to_mask(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """float32 (1, 1, height, width): 1 (white) is painted anew, 0 stays. Raises InputError for an all-black one."""
    import torch

    plain = grey(image)
    resized = plain if plain.size == (width, height) else plain.resize((width, height), Image.Resampling.LANCZOS)
    mask = (np.asarray(resized, np.float32) / 255.0 >= 0.5).astype(np.float32)
    if not mask.any():
        raise InputError("the mask is black all over, so nothing would change: white marks what to paint anew")
    return torch.from_numpy(mask)[None, None]


def to_arrays(images: torch.Tensor) -> np.ndarray:
    """(n, 3, height, width) in -1..1 to (n, height, width, 3) in 0..1."""
    values: np.ndarray = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
    return values


def to_pil(arrays: np.ndarray) -> list[Image.Image]:
    """(n, height, width, 3) in 0..1 to 8-bit pictures."""
    return [Image.fromarray(array) for array in (arrays * 255).round().astype(np.uint8)]


def write_png(image: Image.Image, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG with ``metadata`` as JSON in a text entry; a write that fails leaves no partial file. Raises
    StorageError where it cannot be written."""
    with unfinished_file(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=_texts(metadata))


def png_bytes(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The file that `write_png` would write."""
    written = io.BytesIO()
    image.save(written, format="PNG", pnginfo=_texts(metadata))
    return written.getvalue()


def _texts(metadata: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        # iTXt holds UTF-8; a plain tEXt entry is Latin-1, which many prompts do not fit in.
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
        info.add_text("Software", "coreml-sd")
    return info


def check_writable(path: Path) -> None:
    """Raise InputError or StorageError where a file at ``path`` could not be written, before any work is done."""
    check_name(path, "output")
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise InputError(f"{path}: cannot be written: expected a file name of at most {MAX_NAME} bytes")
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; expected the name of a PNG file")
        existing = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    if not existing.is_dir():
        raise InputError(f"{path}: cannot be written: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: cannot be written: no permission in {existing}")


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write_png` wrote. Raises InputError if there is none."""
    with _opened(path, "picture", ("PNG",)) as image:
        texts = getattr(image, "text", {})
        text = texts.get(METADATA_KEY, texts.get(OLD_METADATA_KEY))
    if text is None:
        raise InputError(f"picture {path}: it does not say how it was made (no {METADATA_KEY!r} entry in the PNG)")
    return strict_json.parse_object(text, f"picture {path}: its record", InputError)
