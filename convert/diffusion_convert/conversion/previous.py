"""What an earlier conversion left in a folder, read once: what of it is kept, what is made again, what makes way.

Whatever was made of the same source with the same options (`Plan.fingerprint`) stays: components and variants are
added to it. Anything else that a conversion made there is replaced, and named before; what differs in the weights'
bits alone gives its 16-bit packages, which are palettized, or stay where they are to have 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffusion_convert.bundle.model_card import CARD_NAME, is_anothers
from diffusion_convert.bundle.sizes import packed
from diffusion_convert.bundle.zip_names import zip_attentions, zip_names, zip_names_by_size
from diffusion_convert.conversion.identity import Identity
from diffusion_convert.conversion.job import Record, read_record, write_record
from diffusion_convert.conversion.plan import Part, Plan
from diffusion_convert.conversion.sizes import take_size
from diffusion_convert.conversion.workspace import Workspace
from diffusion_convert.options import ConvertOptions
from diffusion_runtime import zips
from diffusion_runtime.atomic import unfinished_folder
from diffusion_runtime.bundle import manifest
from diffusion_runtime.bundle.find import KINDS
from diffusion_runtime.bundle.integrity import TOKENIZER, Hashes, faults
from diffusion_runtime.bundle.manifest import Manifest
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import ATTENTIONS, AttentionKind
from diffusion_runtime.picture_size import Size
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES
from diffusion_runtime.real_path import is_there


@dataclass(frozen=True, slots=True)
class Previous:
    """The manifests in ``output`` by attention and kind; None for a damaged one."""

    output: Path
    variants: Mapping[str, Mapping[str, Manifest | None]]

    def widened(self, options: ConvertOptions, identity: Identity) -> ConvertOptions:
        """The options with the variants, components and sizes that are there and of that identity."""
        found = {
            name: made
            for name, kinds in self.variants.items()
            if (made := _first(kinds)) is not None and identity.made(made)
        }
        there = dict.fromkeys(component for made in found.values() for component in made.components)
        return replace(
            options,
            attention=tuple(kind for kind in AttentionKind if kind in options.attention or kind.value in found),
            components=tuple(dict.fromkeys((*options.components, *there))) if options.components else (),
            sizes=tuple(dict.fromkeys((*_sizes(found.values()), *options.sizes))) if options.sizes else (),
        )

    def replaced_note(self, identity: Identity) -> tuple[str, ...]:
        """What makes way for a conversion of that identity, as a sentence; nothing where nothing does."""
        gone = []
        for name, made in ((name, _first(kinds)) for name, kinds in self.variants.items()):
            if made is None:
                gone.append(name)
            elif not identity.made(made):
                gone.append(f"{name} ({', '.join(made.components)})")
        what = "made of another source or with other options or versions"
        return (f"replaces what is in {self.output}, {what}: {', '.join(gone)}",) if gone else ()

    def obsolete(self, new: set[str]) -> tuple[str, ...]:
        """Names of variants, zips and the card of the earlier conversion that are not among the ``new`` ones."""
        card = [] if is_anothers(self.output / CARD_NAME) else [CARD_NAME]
        found = [*self.variants, *card] if self.variants else []
        for name, kinds in self.variants.items():
            for made in filter(None, kinds.values()):
                for other in zip_attentions(name, ()):
                    found += zip_names_by_size(made, other).values()
        return tuple(dict.fromkeys(name for name in found if name not in new and (self.output / name).exists()))


Components = Mapping[tuple[str, str], Mapping[str, manifest.Component]]
"""By attention and kind, then by name."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What of an earlier conversion is of a plan and as it was made: components by attention and kind, and where
    the tokenizers are too. ``other_bits``: packages with whole weights, of a conversion to other bits."""

    previous: Previous
    whole: Components
    other_bits: Components
    tokenizers: frozenset[tuple[str, str]]

    def complete(self, plan: Plan, known: Hashes) -> dict[str, Manifest]:
        """The manifests of the variants, where all that the plan makes is there already; else nothing."""
        found = {}
        for attention in plan.options.attention:
            made = self._complete(plan, attention)
            if made is None or not self._zips_are_there(plan, attention, made, known):
                return {}
            found[attention.value] = made
        return found

    def _complete(self, plan: Plan, attention: AttentionKind) -> Manifest | None:
        wanted = {part.component.name for part in plan.variant(attention)}
        sizes = {shape.size for shape in plan.shapes}
        kinds = self.previous.variants.get(attention.value, {})
        for kind in KINDS[: 1 + plan.compiled]:
            made, folder = kinds.get(kind), self.previous.output / attention.value / kind
            place = attention.value, kind
            if made is None or set(made.sizes) != sizes or place not in self.tokenizers:
                return None
            if not made.components.keys() == self.whole.get(place, {}).keys() == wanted:
                return None
            if not all((folder / name).is_file() for name in VOCABULARY_FILES):  # of an older manifest
                return None
        # Compiled models of an earlier run that this one would not make: not what was asked for.
        if not plan.compiled and (self.previous.output / attention.value / KINDS[1]).exists():
            return None
        return kinds[KINDS[0]]

    def _zips_are_there(self, plan: Plan, attention: AttentionKind, made: Manifest, known: Hashes) -> bool:
        """Whether the variant's zips are there and whole where the plan makes some, else are not there."""
        output, kinds = self.previous.output, self.previous.variants[attention.value]
        names = zip_names(made, attention.value, {kind.value for kind in plan.options.attention})
        compiled = kinds.get(KINDS[1])
        if compiled is None or not (plan.compiled and plan.options.zip):
            return not any((output / name).exists() for name in names)
        for name, size in names.items():
            folder, without, instead = packed(compiled, output / attention.value / KINDS[1], size, known)
            if zips.fault(output / name, folder, known.of, without, instead) is not None:
                return False
        return True

    def take(self, plan: Plan, place: Workspace) -> list[str]:
        """Make parts of the components that are kept, for the conversion to find them finished or ready to be
        palettized. Gives the names of those that were made for other bits."""
        others = []
        for part in plan.parts:
            folder = place.part(part.name)
            if read_record(folder) is not None:
                continue
            found = self._component(self.whole, part, plan)
            if found is None and (found := self._component(self.other_bits, part, plan)) is not None:
                if part.component.palettizes(plan.options):
                    if len(found[1].files) > 1:  # halves, which nothing makes one of
                        continue
                    folder = place.whole(part.name)
                others.append(part.name)
            if found is not None and read_record(folder) is None:
                packages, component = found
                with unfinished_folder(folder) as unfinished:
                    taken = take_size(component, part.shape.size, packages, unfinished)
                    write_record(Record(component=taken), unfinished)
        return others

    def _component(self, known: Components, part: Part, plan: Plan) -> tuple[Path, manifest.Component] | None:
        for attention in plan.options.attention if part.shared else (part.attention,):
            component = known.get((attention.value, KINDS[0]), {}).get(part.component.name)
            made = self.previous.variants.get(attention.value, {}).get(KINDS[0])
            if component is None or made is None or _is_anothers_mix(component, part, plan, made):
                continue
            if part.component.one_size or part.shape.size in made.sizes:
                return self.previous.output / attention.value / KINDS[0], component.at(part.shape.size)
        return None


def read(output: Path) -> Previous:
    """What is in ``output``. Raises InputError if the result would replace something that was not written by a
    conversion."""
    found = {}
    for name in ATTENTIONS:
        folder = output / name
        if folder.is_symlink():
            raise InputError(f"{folder}: is a symbolic link; remove it, or name another folder for the result")
        there = [kind for kind in KINDS if is_there(folder / kind / manifest.FILE_NAME, PackageError)]
        kinds = {kind: _manifest(folder / kind) for kind in there}
        if kinds:
            found[name] = kinds
        elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(
                f"{folder}: exists already and was not written by coreml-sd; choose another output folder"
            )
    return Previous(output, found)


def kept_of(previous: Previous, plan: Plan, known: Hashes) -> Kept:
    """What of ``previous`` can be kept: its files are compared with their manifests here, once."""
    whole, other_bits, tokenizers = {}, {}, set()
    for attention, kinds in previous.variants.items():
        for kind, made in kinds.items():
            if made is None or not (plan.identity.is_like(made) or plan.identity.differs_in_bits(made)):
                continue
            wrong = faults(made, previous.output / attention / kind, known)
            right = {name: c for name, c in made.components.items() if name not in wrong}
            if plan.identity.is_like(made):
                whole[attention, kind] = right
                tokenizers |= {(attention, kind)} if TOKENIZER not in wrong else set()
            else:
                other_bits[attention, kind] = {n: c for n, c in right.items() if c.palettization is None}
    return Kept(previous, whole, other_bits, frozenset(tokenizers))


def _manifest(folder: Path) -> Manifest | None:
    try:
        return manifest.read(folder)
    except PackageError:
        return None


def _first(kinds: Mapping[str, Manifest | None]) -> Manifest | None:
    """The packages' manifest; the compiled models' where that is damaged or missing."""
    return next((made for kind in KINDS if (made := kinds.get(kind)) is not None), None)


def _sizes(found: Iterable[Manifest]) -> Iterator[Size]:
    for made in found:
        yield from made.sizes


def _is_anothers_mix(component: manifest.Component, part: Part, plan: Plan, made: Manifest) -> bool:
    """Whether its weights' bits were chosen for the first of several sizes: this one alone gets others."""
    mixed = plan.options.target_bits is not None and component.palettization is not None
    return mixed and plan.identity.only is not None and part.shape.size != made.sizes[0]
