"""What a conversion is asked to do: validated once, frozen after. The command's options are these fields."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert import option_values as check
from diffusion_convert.option_values import Check, Embedding, Lora
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import (
    DEFAULT_TARGET,
    FAMILIES,
    PALETTE_BITS,
    PROCESSORS,
    TARGETS,
    AttentionKind,
    Layout,
)
from diffusion_runtime.folding import Folding
from diffusion_runtime.picture_size import Size


class Precision(enum.Enum):
    """``auto``: float16, but float32 for the operations whose values come near float16's limit."""

    AUTO = "auto"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True)
class Option:
    """What stands beside an option's type and default: the check of its value, the command's help and name for it
    (empty: the field's), and whether it says how the checkpoint is opened, which `verify` must be told again."""

    check: Check
    help: str
    flag: str
    opening: bool


def about(one: Field[Any]) -> Option:
    found: Option = one.metadata["option"]
    return found


def _option(checked: Check, help_text: str, default: Any = None, flag: str = "", opening: bool = False) -> Any:
    metadata = {"option": Option(checked, help_text, flag, opening)}
    # A dataclass takes no mutable default; and a dict has no hash, so that of the options is made without it.
    if default == {}:
        return field(default_factory=dict, hash=False, metadata=metadata)
    return field(default=default, metadata=metadata)


_opening = partial(_option, opening=True)
_KINDS = ", ".join(f"{kind.value} ({PROCESSORS[kind.about.compute_units]})" for kind in AttentionKind)
_DEFAULT_KINDS = " and ".join(kind.value for kind in FAMILIES["sd1"].attention)
_FOLDED = " or ".join(folding.value for folding in Folding if folding.about.by_default)
_BITS = ", ".join(map(str, PALETTE_BITS))


MOST_PICTURES = 8  # of one IP-Adapter; each makes the UNet's attention longer
_IDLE_WITHOUT = {"only_controlled": "controlnet", "lora_partial": "lora", "image_encoder": "ip_adapter"}
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

    attention: tuple[AttentionKind, ...] = _option(
        check.listed(check.one_of(AttentionKind)),
        f"{_KINDS}; A,B or may be given several times. Default: {_DEFAULT_KINDS}; for SDXL original.",
        (),
    )
    nbits: int | None = _option(check.whole, f"Palettize weights to so many bits ({_BITS}). Default: 16-bit.")
    nbits_for: Mapping[str, int] = _option(
        check.bits_by_name, "Bits of one component, as in unet=6; may be given several times.", {}
    )
    target_bits: float | None = _option(
        check.number, "Average bits, as in 4.5; each weight gets its own, for the least damage."
    )
    recipe: Path | None = _option(
        check.path, "Bits by weight, from a file of palettize --save-recipe; what it does not name is kept."
    )
    components: tuple[str, ...] = _option(
        check.names, "Only these, as in text_encoder,unet; may be given several times. Default: all.", ()
    )
    height: int | None = _option(check.whole, "Height of the picture in pixels. Default: the checkpoint's.")
    width: int | None = _option(check.whole, "Width of the picture in pixels. Default: the checkpoint's.")
    sizes: tuple[Size, ...] = _option(
        check.listed(check.size),
        "Size of the picture, width x height, as 768x512; may be given several times: one set of weights for all. "
        "Sizes are added to those that the same source and options have left in the folder.",
        (),
        "--size",
    )
    batch_size: int | None = _option(
        check.whole,
        "Of the UNet: 2 (InstructPix2Pix: 3) for guidance in one call, or 1. Default: that; 1 for LCM UNets.",
    )
    context_length: int | None = _option(
        check.whole,
        "Text tokens that the UNet takes: 154 or 231 for long prompts, which are encoded in pieces of 77. Other "
        "apps don't do this. Of SD 3, CLIP's 77 and T5's: 333 take 256 of T5, as diffusers. Default: the text "
        "encoder's 77; for SD 3 154, as Apple's apps.",
    )
    target: str = _option(
        check.text, f"Oldest system: {', '.join(TARGETS)}. Default: {DEFAULT_TARGET}.", DEFAULT_TARGET
    )
    chunk_unet: bool = _option(check.flag, "Cut the UNet into two packages, for iOS.", False)
    vae: str | None = _opening(
        check.source, "Another VAE, for encoder and decoder, TAESD too: folder, file or Hub id."
    )
    preview_vae: str | None = _opening(
        check.source, "A VAE (TAESD) whose decoder makes previews, as a component of its own."
    )
    fold: tuple[Folding, ...] = _option(
        check.listed(check.one_of(Folding)),
        "Also put into the models what apps have fixed: prediction (v to epsilon, for apps that know no v).",
        (),
    )
    no_fold: tuple[Folding, ...] = _option(
        check.listed(check.one_of(Folding)),
        f"Keep the checkpoint's own {_FOLDED}, which is put into the models so that apps draw right; may be given "
        "several times.",
        (),
    )
    loras: tuple[Lora, ...] = _opening(
        check.several(check.lora),
        "LoRA to fuse: PATH, PATH:WEIGHT or PATH:WEIGHT,PART=WEIGHT,… with parts unet, te (te1, te2) and blocks "
        "in00 …, mid, out00 …; may be given several times.",
        (),
        "--lora",
    )
    lora_partial: bool = _opening(check.flag, "Leave out what of a LoRA has no place in the checkpoint.", False)
    embeddings: tuple[Embedding, ...] = _opening(
        check.several(check.embedding),
        "Textual inversion to put in: FILE or FILE:TOKEN, as prompts call it (default: the name in the file, else "
        "the file's); may be given several times.",
        (),
        "--embedding",
    )
    clip_skip: int = _option(
        check.whole, "Text states from so many layers earlier, as diffusers' clip_skip. Default: 0.", 0
    )
    revision: str | None = _opening(check.text, "Branch, tag or commit of a Hub repository.")
    family: str | None = _opening(check.text, "sd1, sd2-base, …; an unknown one lists all. Default: detected.")
    variant: str | None = _opening(
        check.text, "Of a folder's weights, as in diffusers: fp16, bf16, ema, non_ema. Default: the best."
    )
    base: str | None = _opening(check.source, "Checkpoint that gives what a file or a UNet alone lacks.")
    refiner: str | None = _opening(
        check.source, "SDXL refiner (folder, file or Hub id): a second UNet, for the last steps."
    )
    controlnets: tuple[str, ...] = _opening(
        check.sources,
        "ControlNets (folder, file or Hub id), and a UNet that they steer; A,B or given several times.",
        (),
        "--controlnet",
    )
    only_controlled: bool = _option(check.flag, "No UNet but the one that ControlNets steer.", False)
    ip_adapters: tuple[str, ...] = _opening(
        check.sources,
        "IP-Adapter, to draw after a picture: a file, or OWNER/NAME/FILE on the Hub; several with commas, or the "
        "option several times.",
        (),
        "--ip-adapter",
    )
    ip_adapter_pictures: int = _opening(
        check.whole, "Pictures that each IP-Adapter can draw after at once, 1 to 8. Default: 1.", 1
    )
    image_encoder: str | None = _opening(
        check.source,
        "The IP-Adapters' image encoder (folder, or on the Hub). Default: image_encoder beside the file.",
    )
    no_t5: bool = _opening(
        check.flag, "Leave out T5, the largest text encoder of SD 3: zeros stand for its states.", False
    )
    t2i_adapters: tuple[str, ...] = _opening(
        check.sources,
        "T2I-Adapters (folder, file or Hub id) that steer the UNet; several with commas, or given several times.",
        (),
        "--t2i-adapter",
    )
    layout: Layout = _option(
        check.one_of(Layout),
        "Whose interface: apple, or comfyui (ComfyUI-CoreMLSuite 2.x). Default: apple.",
        Layout.APPLE,
    )
    precision: Precision = _option(
        check.one_of(Precision),
        "auto (float32 where float16 would overflow), float16 or float32. Default: auto.",
        Precision.AUTO,
    )
    compiled: bool = _option(check.flag, "Compile the packages, for apps. Default: yes.", True)
    zip: bool = _option(check.flag, "Zip the compiled models, for publishing. Default: yes.", True)
    verify: bool = _option(check.flag, "Verify every model. Default: yes.", True)

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
            ip_adapter_pictures: int = ...,
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
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                # The way in which a frozen dataclass settles its own fields: assignment is closed, to itself, too.
                object.__setattr__(self, one.name, about(one).check(one.name, value))
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
        for what, several in (("size", self.sizes), ("attention", [kind.value for kind in self.attention])):
            named = [str(one) for one in several]
            if twice := [one for one in named if named.count(one) > 1]:
                raise InputError(f"--{what} {twice[0]} is given twice: give it once")
        if not 1 <= self.ip_adapter_pictures <= (MOST_PICTURES if self.ip_adapters else 1):
            given = self.ip_adapter_pictures
            raise InputError(f"--ip-adapter-pictures {given}: expected 1 to {MOST_PICTURES}, with --ip-adapter")
        for name, needed in _IDLE_WITHOUT.items():
            if getattr(self, name) and not getattr(self, f"{needed}s"):
                flag, other = (f"--{one.replace('_', '-')}" for one in (name, needed))
                raise InputError(f"{flag}: does nothing without {other}: give one, or leave it out")
        if both := set(self.fold) & set(self.no_fold):
            name = both.pop().value
            raise InputError(f"--fold {name} and --no-fold {name} exclude each other: give one")

    @property
    def foldings(self) -> frozenset[Folding]:
        """What apps have fixed and is put into the models, where the checkpoint needs it."""
        chosen = {folding for folding in Folding if folding.about.by_default} | set(self.fold)
        return frozenset(chosen - set(self.no_fold))
