"""What a conversion is asked to do: validated once, frozen after."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from diffusion_runtime.errors import InputError


class AttentionKind(enum.Enum):
    """``original`` is for the GPU, the other two for the Neural Engine."""

    ORIGINAL = "original"
    SPLIT_EINSUM = "split_einsum"
    SPLIT_EINSUM_V2 = "split_einsum_v2"


class Precision(enum.Enum):
    """``auto``: float16, but float32 for the operations whose values come near float16's limit."""

    AUTO = "auto"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


SPECIFICATIONS = dict(zip((f"macOS{n}" for n in (13, 14, 15, 26)), (7, 8, 9, 10), strict=True)) | dict(
    zip((f"iOS{n}" for n in (16, 17, 18, 26)), (7, 8, 9, 10), strict=True)
)
"""Version of Core ML's specification that a target's packages have."""
TARGETS = tuple(SPECIFICATIONS)
PALETTE_BITS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file or folder and the weight at which it is fused."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of `convert`, with the command line's names and defaults.

    ``components`` empty: all that the checkpoint has. ``height`` and ``width`` in pixels, None: the checkpoint's
    own sample size. Raises InputError for a value that cannot be used.
    """

    attention: tuple[AttentionKind, ...] = (AttentionKind.ORIGINAL, AttentionKind.SPLIT_EINSUM_V2)
    nbits: int | None = None
    nbits_for: Mapping[str, int] = field(default_factory=dict)
    components: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    batch_size: int = 2
    target: str = "macOS13"
    chunk_unet: bool = False
    vae: str | None = None
    loras: tuple[Lora, ...] = ()
    revision: str | None = None
    family: str | None = None
    precision: Precision = Precision.AUTO
    compiled: bool = True
    zip: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise InputError(f"unknown target {self.target!r}: expected one of {', '.join(TARGETS)}")
        for name, bits in {"nbits": self.nbits, **self.nbits_for}.items():
            if bits is not None and bits not in PALETTE_BITS:
                raise InputError(f"{name} {bits}: expected one of {', '.join(map(str, PALETTE_BITS))}")
        if self.batch_size not in (1, 2):
            raise InputError(f"batch size {self.batch_size}: expected 2 (both halves of the guidance at once) or 1")
        if (self.height is None) != (self.width is None):
            raise InputError("--height and --width belong together: give both or neither")
        if not self.attention:
            raise InputError("no attention kind given: expected at least one of " + kinds())
        if len(set(self.attention)) != len(self.attention):
            raise InputError("an attention kind is given twice")


def kinds() -> str:
    """The attention kinds as a list for messages."""
    return ", ".join(kind.value for kind in AttentionKind)


E = TypeVar("E", bound=enum.Enum)


def parse_choice(kind: type[E], name: str, text: str) -> E:
    """The member of ``kind`` whose value is ``text``. Raises InputError, with the known ones."""
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise InputError(f"unknown {name} {text!r}: expected one of {known}") from None


def parse_lora(text: str) -> Lora:
    """``PATH`` or ``PATH:WEIGHT``; a path with a colon in it is taken as it is where it exists."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(Path(text))
    try:
        return Lora(Path(path), float(weight))
    except ValueError:
        raise InputError(f"--lora {text!r}: expected PATH or PATH:WEIGHT, as in style.safetensors:0.8") from None


def parse_list(texts: Iterable[str]) -> tuple[str, ...]:
    """``["a,b", "c"]`` -> ``("a", "b", "c")``."""
    return tuple(name for text in texts for part in text.split(",") if (name := part.strip()))


def parse_nbits(texts: Iterable[str]) -> dict[str, int]:
    """``["unet=6"]`` -> ``{"unet": 6}``."""
    found = {}
    for text in parse_list(texts):
        name, _, bits = text.partition("=")
        if not name or not bits.isdigit():
            raise InputError(f"--nbits-for {text!r}: expected COMPONENT=BITS, as in unet=6")
        found[name] = int(bits)
    return found
