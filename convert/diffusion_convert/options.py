"""What a conversion is asked to do: validated once, frozen after."""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion_runtime.errors import InputError
from diffusion_runtime.families import DEFAULT_TARGET, PALETTE_BITS, TARGETS, AttentionKind, Layout
from diffusion_runtime.folding import Folding
from diffusion_runtime.picture_size import Size, parse_size


class Precision(enum.Enum):
    """``auto``: float16, but float32 for the operations whose values come near float16's limit."""

    AUTO = "auto"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


E = TypeVar("E", bound=enum.Enum)


LORA_PARTS = re.compile(r"unet|te|te1|te2|mid|(?:in|out)\d\d")
"""What a LoRA can have a weight of its own for: networks, and the UNet's blocks as trainers count them."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file or folder and the weight at which it is fused. A path's text is taken for the path.

    ``parts`` are other weights by part: "unet", "te" (text encoders; "te1" and "te2" for one of them) and the
    UNet's blocks ("in00" …, "mid", "out00" …). The most particular one counts, and takes the place of the others.
    """

    path: Path
    weight: float = 1.0
    parts: tuple[tuple[str, float], ...] = ()

    if TYPE_CHECKING:  # what is taken for the fields' types

        def __init__(
            self,
            path: str | os.PathLike[str],
            weight: float = 1.0,
            parts: Mapping[str, float] | Iterable[tuple[str, float]] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(_typed("LoRA path", self.path, (str, os.PathLike), "a path")))
        check_path("--lora ", self.path)
        given = self.parts.items() if isinstance(self.parts, Mapping) else self.parts
        parts = dict(_typed("LoRA parts", given, (Iterable,), 'weights by part, as {"te": 0.5}'))
        for name, weight in {"": self.weight, **parts}.items():
            if not math.isfinite(_typed("LoRA weight", weight, (int, float), "a number")):
                raise InputError(f"{self.path}: LoRA weight {weight}: expected a number")
            if name and LORA_PARTS.fullmatch(name) is None:
                raise InputError(
                    f"{self.path}: LoRA weight for {name!r}: expected unet, te, te1, te2, mid or a block as in04"
                )
        object.__setattr__(self, "parts", tuple(parts.items()))


@dataclass(frozen=True, slots=True)
class Embedding:
    """A file of textual inversion (or a folder with learned_embeds.safetensors) and what prompts call it. ``token``
    None: as the file calls it, else the file's name. A path's text is taken for the path."""

    path: Path
    token: str | None = None

    if TYPE_CHECKING:  # what is taken for the fields' types

        def __init__(self, path: str | os.PathLike[str], token: str | None = None) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(_typed("embedding", self.path, (str, os.PathLike), "a path")))
        check_path("--embedding ", self.path)
        if self.token is not None and not _typed("embedding token", self.token, (str,), "a text").strip():
            raise InputError(f"--embedding {self.path}: the token after the colon is empty")


SizeLike = Size | tuple[int, int] | str
"""Width and height in pixels, or a text as the command line takes it."""

EmbeddingLike = Embedding | str | os.PathLike[str]
LoraLike = Lora | str | os.PathLike[str]
"""A LoRA, its path, or a text as the command line takes it."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of `convert`, with the command line's names and defaults.

    ``attention`` empty: what the family is converted with (`Family.attention`). ``components`` empty: all that
    there are. ``height`` and ``width`` in pixels, None: the checkpoint's own sample size; ``sizes`` are several,
    width before height, "768x512" as the command line takes them. ``batch_size`` of the UNet, None: 2, both halves
    of the guidance (3 where a picture guides, too), or 1 where it takes the guidance scale as an input. ``nbits``,
    ``target_bits`` (an average: each weight gets bits of its own) and ``recipe`` (a file of bits by weight)
    exclude each other; ``nbits_for`` goes before them. ``context_length``: text tokens that the UNet takes,
    None: as many as the text encoder; two or three times as many are for long prompts, which are encoded in
    pieces. ``fold`` and ``no_fold``: which foldings (`diffusion_runtime.folding`) to do other than by default.
    ``controlnets``: folders, files or Hub ids of ControlNets for it, in place of their text too; with
    ``only_controlled`` there is no UNet but the one that they steer.
    ``no_t5``: leave the largest text encoder of Stable Diffusion 3 out.
    ``layout``: whose interface the models get (`layouts`). Texts as the command line takes them ("float32",
    "unet,vae_decoder", "style.safetensors:0.8") become
    what the fields are declared as, and one value stands for a tuple of one. Raises InputError for a value that
    cannot be used.
    """

    attention: tuple[AttentionKind, ...] = ()
    nbits: int | None = None
    nbits_for: Mapping[str, int] = field(default_factory=dict, hash=False)
    target_bits: float | None = None
    recipe: Path | None = None
    components: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    sizes: tuple[Size, ...] = ()
    batch_size: int | None = None
    context_length: int | None = None
    target: str = DEFAULT_TARGET
    chunk_unet: bool = False
    vae: str | None = None
    preview_vae: str | None = None
    fold: tuple[Folding, ...] = ()
    no_fold: tuple[Folding, ...] = ()
    loras: tuple[Lora, ...] = ()
    lora_partial: bool = False
    embeddings: tuple[Embedding, ...] = ()
    clip_skip: int = 0
    revision: str | None = None
    family: str | None = None
    variant: str | None = None
    base: str | None = None
    refiner: str | None = None
    controlnets: tuple[str, ...] = ()
    only_controlled: bool = False
    ip_adapters: tuple[str, ...] = ()
    image_encoder: str | None = None
    no_t5: bool = False
    t2i_adapters: tuple[str, ...] = ()
    layout: Layout = Layout.APPLE
    precision: Precision = Precision.AUTO
    compiled: bool = True
    zip: bool = True
    verify: bool = True

    if TYPE_CHECKING:  # what is taken for the fields' types

        def __init__(
            self,
            attention: AttentionKind | str | Iterable[AttentionKind | str] = ...,
            nbits: int | None = ...,
            nbits_for: Mapping[str, int] = ...,
            target_bits: float | None = ...,
            recipe: str | os.PathLike[str] | None = ...,
            components: str | Iterable[str] = ...,
            height: int | None = ...,
            width: int | None = ...,
            sizes: SizeLike | Iterable[SizeLike] = ...,
            batch_size: int | None = ...,
            context_length: int | None = ...,
            target: str = ...,
            chunk_unet: bool = ...,
            vae: str | os.PathLike[str] | None = ...,
            preview_vae: str | os.PathLike[str] | None = ...,
            fold: Folding | str | Iterable[Folding | str] = ...,
            no_fold: Folding | str | Iterable[Folding | str] = ...,
            loras: LoraLike | Iterable[LoraLike] = ...,
            lora_partial: bool = ...,
            embeddings: EmbeddingLike | Iterable[EmbeddingLike] = ...,
            clip_skip: int = ...,
            revision: str | None = ...,
            family: str | None = ...,
            variant: str | None = ...,
            base: str | None = ...,
            refiner: str | os.PathLike[str] | None = ...,
            controlnets: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = ...,
            only_controlled: bool = ...,
            ip_adapters: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = ...,
            image_encoder: str | os.PathLike[str] | None = ...,
            no_t5: bool = ...,
            t2i_adapters: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = ...,
            layout: Layout | str = ...,
            precision: Precision | str = ...,
            compiled: bool = ...,
            zip: bool = ...,
            verify: bool = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        for name, value in _settled(self).items():
            object.__setattr__(self, name, value)
        if self.target not in TARGETS:
            raise InputError(f"unknown target {self.target!r}: expected one of {', '.join(TARGETS)}")
        for name, bits in {"nbits": self.nbits, **self.nbits_for}.items():
            if bits is not None and bits not in PALETTE_BITS:
                raise InputError(f"{name} {bits}: expected one of {', '.join(map(str, PALETTE_BITS))}")
            if bits == 3 and TARGETS[self.target] < TARGETS["macOS15"]:
                raise InputError(f"{name} 3: needs --target macOS15 / iOS18 or later; {self.target} takes 2 or 4")
        if sum(value is not None for value in (self.nbits, self.target_bits, self.recipe)) > 1:
            raise InputError("--nbits, --target-bits and --recipe exclude each other: give one")
        low, high = min(PALETTE_BITS), max(PALETTE_BITS)
        if self.target_bits is not None and not low <= self.target_bits <= high:
            raise InputError(f"--target-bits {self.target_bits:g}: expected {low} to {high}")
        if self.batch_size not in (None, 1, 2, 3):
            raise InputError(
                f"batch size {self.batch_size}: expected 2 (both halves of the guidance at once) or 1; 3 where a "
                "picture guides, too"
            )
        if (self.height is None) != (self.width is None):
            raise InputError("--height and --width belong together: give both or neither")
        if self.sizes and self.height is not None:
            raise InputError("--size and --height with --width exclude each other: give one")
        if len(set(self.sizes)) != len(self.sizes):
            raise InputError("a size is given twice")
        if len(set(self.attention)) != len(self.attention):
            raise InputError("an attention kind is given twice")
        if self.only_controlled and not self.controlnets:
            raise InputError("--only-controlled: there is no UNet to steer without --controlnet: give one")
        if both := set(self.fold) & set(self.no_fold):
            name = both.pop().value
            raise InputError(f"--fold {name} and --no-fold {name} exclude each other: give one")

    @property
    def foldings(self) -> frozenset[Folding]:
        """What apps have fixed and is put into the models, where the checkpoint needs it."""
        chosen = {folding for folding in Folding if folding.about.by_default} | set(self.fold)
        return frozenset(chosen - set(self.no_fold))


def _settled(options: ConvertOptions) -> dict[str, Any]:
    """The fields whose values may be given in other forms than they are declared, as declared. Raises InputError
    for a value of a wrong type in any field."""
    for name in ("nbits", "height", "width", "batch_size", "context_length", "clip_skip"):
        if getattr(options, name) is not None:
            _typed(name, getattr(options, name), (int,), "a whole number")
    if options.target_bits is not None:
        _typed("target_bits", options.target_bits, (int, float), "a number")
    for name in ("chunk_unet", "only_controlled", "lora_partial", "no_t5", "compiled", "zip", "verify"):
        _typed(name, getattr(options, name), (bool,), "True or False")
    for name in ("target", "revision", "family", "variant"):
        if name == "target" or getattr(options, name) is not None:
            _typed(name, getattr(options, name), (str,), "a text")
    for name, bits in _typed("nbits_for", options.nbits_for, (Mapping,), 'a mapping as {"unet": 6}').items():
        _typed(f"nbits_for {name}", bits, (int,), "a whole number")
    return {
        "attention": tuple(
            _member(AttentionKind, "attention", value) for value in _several("attention", options.attention)
        ),
        "sizes": tuple(_size(value) for value in _several("sizes", options.sizes)),
        "layout": _member(Layout, "layout", options.layout),
        "precision": _member(Precision, "precision", options.precision),
        **{
            name: tuple(_member(Folding, name, value) for value in _several(name, getattr(options, name)))
            for name in ("fold", "no_fold")
        },
        "components": parse_list(
            _typed("components", value, (str,), "names of components")
            for value in _several("components", options.components)
        ),
        "loras": tuple(_lora(value) for value in _several("loras", options.loras)),
        "embeddings": tuple(_embedding(value) for value in _several("embeddings", options.embeddings)),
        "controlnets": tuple(
            source
            for value in _several("controlnets", options.controlnets)
            for source in _sources("controlnet", value)
        ),
        "recipe": _path("recipe", options.recipe),
        **{
            name: parse_list(_source(name, value) or "" for value in _several(name, getattr(options, name)))
            for name in ("ip_adapters", "t2i_adapters")
        },
        **{
            name: _source(name, getattr(options, name))
            for name in ("vae", "preview_vae", "base", "refiner", "image_encoder")
        },
    }


def _path(name: str, value: Any) -> Path | None:
    if value is None:
        return None
    check_path(f"--{name} ", _typed(name, value, (str, os.PathLike), "a path"))
    return Path(value)


def _source(name: str, value: Any) -> str | None:
    return None if value is None else os.fspath(_typed(name, value, (str, os.PathLike), "a path or Hub id"))


def _sources(name: str, value: Any) -> tuple[str, ...]:
    """``A,B`` -> ``("A", "B")``; a path with a comma in it is taken as it is where it exists."""
    text = str(_source(name, value))
    return (text,) if isinstance(value, os.PathLike) or Path(text).exists() else parse_list([text])


def check_path(option: str, path: str | os.PathLike[str] | None) -> None:
    """Raises InputError for a text that no file system takes for a path. ``option``: what it was given as."""
    try:
        usable = path is None or b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise InputError(f"{option}{os.fspath(path or '')!a}: no path: it holds a NUL or half a surrogate pair")


def _typed(name: str, value: Any, types: tuple[type, ...], expected: str) -> Any:
    """``value``, if it is of one of the types; True is no number. Raises InputError otherwise."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise InputError(f"{name} {value!r}: expected {expected}")
    return value


def _several(name: str, value: Any) -> tuple[Any, ...]:
    """``value`` as a tuple: one text, path, kind or LoRA stands for a tuple of one."""
    if isinstance(value, (str, os.PathLike, enum.Enum, Lora, Embedding, Size)):
        return (value,)
    return tuple(_typed(name, value, (Iterable,), "one value or several"))


def _member(kind: type[E], name: str, value: Any) -> E:
    return value if isinstance(value, kind) else parse_choice(kind, name, value)


def _size(value: Any) -> Size:
    if isinstance(value, str):
        return parse_size(value)
    width, height = _typed("size", value, (tuple,), "WIDTHxHEIGHT in pixels, as 768x512")
    return Size(*(_typed(f"size {value!r}", side, (int,), "whole numbers of pixels") for side in (width, height)))


def _lora(value: Any) -> Lora:
    if isinstance(value, Lora):
        return value
    return parse_lora(value) if isinstance(value, str) else Lora(value)


def _embedding(value: Any) -> Embedding:
    if isinstance(value, Embedding):
        return value
    return parse_embedding(value) if isinstance(value, str) else Embedding(value)


def parse_embedding(text: str) -> Embedding:
    """``FILE`` or ``FILE:TOKEN``; a path with a colon in it is taken as it is where it exists."""
    path, colon, token = text.rpartition(":")
    return Embedding(path, token) if colon and not Path(text).exists() else Embedding(text)


def parse_choice(kind: type[E], name: str, text: str) -> E:
    """The member of ``kind`` whose value is ``text``. Raises InputError, with the known ones."""
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise InputError(f"unknown {name} {text!r}: expected one of {known}") from None


def parse_lora(text: str) -> Lora:
    """``PATH``, ``PATH:WEIGHT``, ``PATH:PART=WEIGHT,…`` or ``PATH:WEIGHT,PART=WEIGHT,…``; a path with a colon in it
    is taken as it is where it exists."""
    path, colon, told = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(Path(text))
    first, *others = told.split(",")
    whole, pairs = ("1", [first, *others]) if "=" in first else (first, others)
    try:
        weight = float(whole)
        parts = [(name.strip(), float(value)) for name, _, value in (pair.partition("=") for pair in pairs)]
    except ValueError:
        raise InputError(
            f"--lora {text!r}: expected PATH, PATH:WEIGHT or PATH:WEIGHT,PART=WEIGHT, as in "
            "style.safetensors:0.8,te=0"
        ) from None
    names = [_block(name) for name, _ in parts]
    if len(set(names)) < len(names):
        raise InputError(f"--lora {text!r}: a part has two weights: expected one")
    return Lora(Path(path), weight, tuple(zip(names, (value for _, value in parts), strict=True)))


def _block(part: str) -> str:
    """``in4`` -> ``in04``."""
    found = re.fullmatch(r"(in|out)(\d)", part)
    return f"{found[1]}0{found[2]}" if found is not None else part


def parse_list(texts: Iterable[str]) -> tuple[str, ...]:
    """``["a,b", "c"]`` -> ``("a", "b", "c")``."""
    return tuple(name for text in texts for part in text.split(",") if (name := part.strip()))


def parse_nbits(texts: Iterable[str]) -> dict[str, int]:
    """``["unet=6"]`` -> ``{"unet": 6}``."""
    found = {}
    for text in parse_list(texts):
        name, _, bits = text.partition("=")
        if not name or not (bits.isascii() and bits.isdecimal()):
            raise InputError(f"--nbits-for {text!r}: expected COMPONENT=BITS, as in unet=6")
        found[name] = int(bits)
    return found
