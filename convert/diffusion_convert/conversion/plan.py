"""What a conversion is going to make, settled and checked before any work: components, sizes, disk, identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from diffusion_convert import components, layouts
from diffusion_convert.bundle.zip_names import zip_attentions
from diffusion_convert.checkpoint import folding, t2i_adapter, torch_networks
from diffusion_convert.checkpoint.family import default_size, is_untrained, latent_factor, text_length
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.vocabulary import check_t5, check_vocabulary, unknown_tokens
from diffusion_convert.components.component import Component, Shape
from diffusion_convert.components.text_encoder import most_skipped
from diffusion_convert.conversion.identity import Identity, fingerprint
from diffusion_convert.options import ConvertOptions, Precision
from diffusion_convert.palettize.recipe import Recipe, load_recipe
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import COMPONENTS, FAMILIES, T5, TARGETS, UNETS, AttentionKind, compiles, kind_of
from diffusion_runtime.folding import Folding
from diffusion_runtime.picture_size import Size

FUNCTIONS_TARGET = "macOS15"
"""The first target whose packages hold several functions."""
_FUNCTIONS_NOT_COMPILED = (
    "several sizes: packages only, no compiled models, as the compiled form of packages with several functions is "
    "not known here; an older target (macOS14, iOS17) gives them, or on a Mac `coreml-sd bundle OUTPUT "
    "--compiler xcrun`"
)


@dataclass(frozen=True, slots=True)
class Part:
    """One component for one attention, or for all of them (``shared``), and one size: converted, verified and kept
    as a whole."""

    component: Component
    attention: AttentionKind
    shared: bool
    shape: Shape
    size: Size | None = None
    """Where sizes are asked for by name, so that others can be added: that of the pictures."""

    def is_like(self, other: Part) -> bool:
        """Whether both are the same except for the size."""
        return self.component.name == other.component.name and self.attention is other.attention

    @property
    def any_attention(self) -> str:
        """The name of all parts that differ in attention alone."""
        return "-".join([self.component.name, *([] if self.size is None else [str(self.size)])])

    @property
    def name(self) -> str:
        attention = () if self.shared else (self.attention.value,)
        return "-".join([self.component.name, *attention, *([] if self.size is None else [str(self.size)])])


@dataclass(frozen=True, slots=True)
class Plan:
    """``identity`` tells which models can stay beside those that are made. ``order`` is that in which ``parts`` are
    made: the largest networks last, as what a conversion leaves in memory lies beside all that follow.
    ``compiled``: whether compiled models are made; ``notes`` are sentences for the user."""

    checkpoint: Checkpoint
    options: ConvertOptions
    shapes: tuple[Shape, ...]
    parts: tuple[Part, ...]
    order: tuple[Part, ...]
    identity: Identity
    size_bytes: int
    compiled: bool
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """Of the pictures where no size is asked for: the first of ``shapes``."""
        return self.shapes[0]

    def variant(self, attention: AttentionKind) -> tuple[Part, ...]:
        """The parts that a variant consists of."""
        return tuple(part for part in self.parts if part.shared or part.attention is attention)


MAX_T5_LENGTH = 512
"""Of what diffusers' StableDiffusion3Pipeline takes, the most."""
MAX_PIECES = 8
"""In how many pieces a prompt may be encoded. Attention to more tokens costs time and memory at every step."""


def make_plan(checkpoint: Checkpoint, options: ConvertOptions, identity: Identity | None = None) -> Plan:
    """``identity`` is what `identify` says; None where nothing is to be written.

    Raises InputError or CheckpointError for what cannot be converted so: every component's weights are compared
    with their network's, sizes with what the networks can do."""
    layouts.check(checkpoint, options)
    _check_attention(checkpoint, options)
    _check_texts(checkpoint, options)
    if options.preview_vae is not None and not layouts.has(options.layout, "preview_vae_decoder"):
        raise InputError(f"--preview-vae: models for --layout {options.layout.value} have none: leave it out")
    shapes = _shapes(checkpoint, options)
    for shape in shapes:
        t2i_adapter.check_size(checkpoint, shape.height, shape.width)
    chosen = _components(checkpoint, options)
    weights, notes = {}, [*checkpoint.notes, *_check_vocabularies(checkpoint), *_size_notes(checkpoint, shapes)]
    for subfolder in dict.fromkeys(component.subfolder for component in chosen):
        submodel = checkpoint.models[subfolder]
        tensors = submodel.tensors()
        network = torch_networks.check(submodel, tensors, f"{checkpoint.name}: {subfolder}")
        if unused := torch_networks.unused_layers(submodel, tensors):
            notes.append(f"{subfolder}: its configuration leaves out the last {unused} of its weights' layers")
        weights[subfolder] = sum(parameter.numel() for parameter in network.parameters())
    parts = tuple(
        Part(component, attention, not component.uses_attention, shape, size)
        for component in chosen
        for attention in (options.attention if component.uses_attention else (AttentionKind.ORIGINAL,))
        for shape, size in _each_size(component, shapes, options)
    )
    wanted = options.compiled and layouts.LAYOUTS[options.layout].compiled
    compiled = wanted and compiles(TARGETS[options.target])
    if wanted and not compiled:
        notes.append(_not_compiled(options.target))
    if compiled and len(shapes) > 1 and joins_sizes(options.target):
        compiled = False
        notes.append(_FUNCTIONS_NOT_COMPILED)
    size = _size(weights, parts, options, compiled)
    order = tuple(sorted(parts, key=lambda part: weights[part.component.subfolder]))
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    checkpoint = folding.fold(checkpoint, options.foldings & layouts.LAYOUTS[options.layout].foldings)
    notes += _fold_notes(checkpoint, options)
    identity = identity or Identity("", "", None)
    return Plan(checkpoint, options, shapes, parts, order, identity, size, compiled, recipe, tuple(notes))


def _check_attention(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    family = FAMILIES[checkpoint.family]
    if refused := [kind.value for kind in options.attention if kind not in family.denoiser.attention]:
        raise InputError(
            f"--attention {refused[0]}: {family.title} is converted with "
            f"{', '.join(kind.value for kind in family.denoiser.attention)} attention only: picture and text "
            "attend to each other as one, and its program cut by heads is too large for the Neural Engine"
        )


def _check_texts(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    """Raises InputError for more layers to skip than the text encoders have."""
    most = most_skipped(checkpoint)
    if not 0 <= options.clip_skip <= most:
        raise InputError(
            f"--clip-skip {options.clip_skip}: expected 0 to {most}: the text encoder of {checkpoint.name} has no "
            "more layers"
        )


def _check_vocabularies(checkpoint: Checkpoint) -> Iterator[str]:
    """Raises CheckpointError for tokenizers that cannot be used; yields what of them cannot."""
    encoders = [name for name in FAMILIES[checkpoint.family].encoders if name in checkpoint.models]
    tokenizers = {name: checkpoint.tokenizers.get(name, {}) for name in encoders}
    try:
        for files in tokenizers.values():
            check_vocabulary(files)
        for encoder, files in tokenizers.items():
            size = int(checkpoint.models[encoder].config["vocab_size"])
            if unknown := unknown_tokens(files, size):
                yield (
                    f"{encoder} has an embedding for {size} tokens, its tokenizer has {len(unknown)} more: prompts "
                    f"with {torch_networks.listed(list(unknown))} cannot be drawn"
                )
        if (t5 := checkpoint.models.get(COMPONENTS[T5].subfolder)) is not None:
            check_t5(checkpoint.tokenizers.get(COMPONENTS[T5].subfolder, {}), int(t5.config["vocab_size"]))
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error


def _fold_notes(checkpoint: Checkpoint, options: ConvertOptions) -> Iterator[str]:
    if Folding.PREDICTION in options.fold and folding.prediction(checkpoint) == "v_prediction":
        yield (
            "the UNet stays one of v prediction: its schedule ends without a signal (zero terminal SNR), where "
            "noise predictions tell nothing of the picture"
        )


def _components(checkpoint: Checkpoint, options: ConvertOptions) -> tuple[Component, ...]:
    table = {
        name: layouts.laid_out(component, options.layout)
        for name, component in components.table(checkpoint.models).items()
        if layouts.has(options.layout, name)
    }
    left_out = {"unet"} if options.only_controlled else set()
    there = {
        name: table[name] for name in components.of_checkpoint(checkpoint) if name in table and name not in left_out
    }
    known, asked = _kinds(table), options.components
    if unknown := [name for name in asked if name not in {*known, *COMPONENTS}]:
        raise InputError(f"unknown component {unknown[0]!r}: expected one of {', '.join(known)}")
    if missing := [name for name in asked if name not in _kinds(there)]:
        raise InputError(f"{checkpoint.name} has no {missing[0]}; it has {', '.join(there)}")
    chosen = {name: there[name] for name in there if not asked or {name, kind_of(name)} & set(asked)}
    if idle := [name for name in options.nbits_for if name not in _kinds(chosen)]:
        raise InputError(f"--nbits-for: {idle[0]} is not converted; what is: {', '.join(chosen)}")
    if options.chunk_unet and not set(UNETS) & chosen.keys():
        raise InputError(f"--chunk-unet: unet is not converted; what is: {', '.join(chosen)}")
    bits = None if options.target_bits is None else f"{options.target_bits:g}"
    for option, value in (("--target-bits", bits), ("--recipe", options.recipe)):
        if value is not None and not any(component.mixed(options) for component in chosen.values()):
            can = ", ".join(name for name, component in table.items() if component.palettized)
            raise InputError(
                f"{option} {value}: nothing that is converted follows it; {can} can, without --nbits-for"
            )
    if options.nbits is not None and not any(
        component.palettized and not {name, kind_of(name)} & options.nbits_for.keys()
        for name, component in chosen.items()
    ):
        can = ", ".join(name for name, component in table.items() if component.palettized)
        raise InputError(f"--nbits {options.nbits}: nothing that is converted follows it; {can} can")
    return tuple(chosen.values())


def _kinds(names: Iterable[str]) -> tuple[str, ...]:
    """What options call these components: by their names, and several of a kind together by the kind."""
    return tuple(dict.fromkeys(one for name in names for one in (kind_of(name), name)))


def _not_compiled(target: str) -> str:
    return (
        f"target {target}: packages only, no compiled models, whose form for that system is not known here; an "
        "older target gives them, or on a Mac `coreml-sd bundle OUTPUT --compiler xcrun`"
    )


def joins_sizes(target: str) -> bool:
    """Whether models of several sizes become functions of one package, as systems of that target know them."""
    return TARGETS[target] >= TARGETS[FUNCTIONS_TARGET]


def _each_size(
    component: Component, shapes: Sequence[Shape], options: ConvertOptions
) -> Iterator[tuple[Shape, Size | None]]:
    for shape in shapes[:1] if component.one_size else shapes:
        named = options.sizes and not component.one_size
        yield shape, shape.size if named else None


def _shapes(checkpoint: Checkpoint, options: ConvertOptions) -> tuple[Shape, ...]:
    vae = checkpoint.models["vae"].config
    default = default_size(checkpoint.denoiser.config, vae)
    factor = latent_factor(vae)
    factor *= int(checkpoint.denoiser.config.get("patch_size", 1))
    least = -(-8 * latent_factor(vae) // factor)
    own = Size(options.width or default[1], options.height or default[0])
    for asked in options.sizes or (own,):
        for name, side in (("height", asked.height), ("width", asked.width)):
            if side < least * factor or side % factor:
                near = sorted({max(least, side // factor) * factor, max(least, side // factor + 1) * factor})
                told = f"--size {asked}: {name} {side}" if options.sizes else f"--{name} {side}"
                raise InputError(
                    f"{told}: expected a multiple of {factor} of at least {least * factor}; "
                    f"near it {'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}"
                )
        most = checkpoint.denoiser.config.get("pos_embed_max_size")  # patches on a side that it knows places for
        if most is not None and max(asked.height, asked.width) > most * factor:
            raise InputError(f"{asked} pixels: {checkpoint.name} takes at most {most * factor} on a side")
    batch, tokens = settled_batch_size(checkpoint, options), _context_length(checkpoint, options)
    return tuple(Shape(size.height, size.width, batch, tokens) for size in options.sizes or (own,))


def _context_length(checkpoint: Checkpoint, options: ConvertOptions) -> int | None:
    length, asked = text_length(checkpoint), options.context_length
    if FAMILIES[checkpoint.family].joint_text:
        if asked is not None and not length < asked <= length + MAX_T5_LENGTH:
            raise InputError(
                f"--context-length {asked}: expected {length + 1} to {length + MAX_T5_LENGTH}: CLIP's {length} and "
                f"those of T5; {2 * length} are Apple's apps', {length + 256} diffusers' default"
            )
        return asked or 2 * length
    if asked is not None and (asked % length or not 0 < asked <= MAX_PIECES * length):
        known = ", ".join(str(length * pieces) for pieces in range(1, MAX_PIECES + 1))
        raise InputError(f"--context-length {asked}: expected {known}: prompts are encoded in pieces of {length}")
    return asked


def settled_batch_size(checkpoint: Checkpoint, options: ConvertOptions) -> int:
    """What is asked for; else one row for each part of the guidance, or one where the UNet takes the scale. Raises
    InputError for rows that could never be filled."""
    rows = FAMILIES[checkpoint.family].guided_rows
    if (options.batch_size or 1) > rows:
        raise InputError(f"--batch-size {options.batch_size}: guidance takes {rows} rows of {checkpoint.family}")
    return options.batch_size or (1 if checkpoint.takes_guidance else rows)


def _size_notes(checkpoint: Checkpoint, shapes: Sequence[Shape]) -> Iterator[str]:
    """A sentence on each size that the model was not trained for. Upscalers take pictures of any size."""
    height, width = default_size(checkpoint.denoiser.config, checkpoint.models["vae"].config)
    for shape in () if FAMILIES[checkpoint.family].class_labels else shapes:
        if is_untrained((shape.height, shape.width), (height, width)):
            yield (
                f"{shape.width}x{shape.height} pixels (width x height): {checkpoint.name} was trained for about "
                f"the pixels of {width}x{height}; at other sizes such models repeat themselves or lose detail"
            )


def _size(weights: Mapping[str, int], parts: Sequence[Part], options: ConvertOptions, compiled: bool) -> int:
    """About how many bytes the result has, and no fewer than the conversion needs on its way: weights of two bytes,
    once more where compiled (where no hard links are), once more, in as many bits as they have, in every zip."""
    width = 32 if options.precision is Precision.FLOAT32 else 16

    def stored(part: Part, bits: int) -> int:
        return weights[part.component.subfolder] * bits // 8

    packages = sum(stored(part, width) for part in parts)
    kinds = {kind.value for kind in options.attention}
    zipped = sum(
        stored(part, part.component.bits(options) or width) * len(zip_attentions(attention.value, kinds))
        for attention in options.attention
        for part in parts
        if part.shared or part.attention is attention
    )
    return packages * (1 + int(compiled)) + zipped * int(compiled and options.zip)


def identify(checkpoint: Checkpoint, options: ConvertOptions) -> Identity:
    """See `Identity`. Raises InputError for sizes that the networks cannot make."""
    first = _shapes(checkpoint, options)[0]
    whole_weights = replace(options, nbits=None, nbits_for={}, target_bits=None, recipe=None)
    only = None if options.sizes else first.size
    return Identity(fingerprint(checkpoint, options), fingerprint(checkpoint, whole_weights), only)
