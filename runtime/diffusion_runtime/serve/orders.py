"""What is asked for and what comes back, whatever the API."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from diffusion_runtime.picture_size import Size, listed
from diffusion_runtime.png_record import Settings


@dataclass(frozen=True, slots=True)
class Wanted:
    """One picture. ``image`` and ``mask`` are files' bytes; ``mask_is_alpha``: what is transparent in the mask or,
    without one, in the image is painted anew."""

    settings: Settings
    image: bytes | None = None
    mask: bytes | None = None
    mask_is_alpha: bool = False
    control_pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """Pictures that one request asks for. ``preview_every`` steps, a preview is made; 0: none."""

    pictures: tuple[Wanted, ...]
    preview_every: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture that was made, as a PNG with its record."""

    png: bytes
    flagged: bool
    settings: Settings
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Of an order: the picture (from 0), the step that is done (from 1) of ``total``, a preview as PNG."""

    picture: int
    step: int
    total: int
    preview: bytes | None = None


@dataclass(frozen=True, slots=True)
class About:
    """What a set of models is, as its worker says when it has loaded them. ``sizes`` are in pixels, the first is
    made where none is asked for; ``memory`` in bytes; ``needs`` and ``uses`` are keys of `tasks.job.GIVEN`: what it
    has to be given, and what it can be."""

    name: str
    family: str
    attention: str
    sizes: tuple[Size, ...]
    needs: tuple[str, ...]
    uses: tuple[str, ...]
    can_start_from_pictures: bool
    memory: int
    seconds: float
    controlnets: tuple[str, ...] = ()

    def size(self, width: int | None, height: int | None) -> Size:
        """That of the pictures, None: the first one's. Raises Refused for one that they don't make."""
        own = self.sizes[0]
        size = Size(width or own.width, height or own.height)
        if size not in self.sizes:
            raise Refused(f"size {size}: the models {self.name} make {self.made}")
        return size

    @property
    def made(self) -> str:
        """The sizes, in words."""
        return f"{self.sizes[0]} alone" if len(self.sizes) == 1 else listed(self.sizes)


class Refused(Exception):
    """An order that cannot be made as it is: the client's fault."""


class Busy(Exception):
    """The queue is full. ``seconds`` until another try may succeed."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in about {seconds} s")
        self.seconds = seconds


class Closing(Exception):
    """The server is going down and begins nothing new."""


class Late(Exception):
    """The deadline passed before the pictures were made."""


class Lost(Exception):
    """The worker died with this order, more than once."""


class Cancelled(Exception):
    """Somebody has cancelled the order; ``pictures`` were finished."""

    def __init__(self, pictures: tuple[Picture, ...]) -> None:
        super().__init__("cancelled")
        self.pictures = pictures
