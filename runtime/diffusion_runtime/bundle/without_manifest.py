"""Folders that others made: Apple's converter, Hub repositories of compiled models. They have no manifest, so
one is made from the models' interfaces; what no interface tells is taken from the family, and said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_runtime.backends.interface import specs
from diffusion_runtime.bundle.manifest import Component, ControlNet, Latents, Manifest, Refiner, Source, Tensor
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.families import (
    CHUNKED,
    COMPONENTS,
    FAMILIES,
    LATENT_SCALE,
    UNETS,
    Family,
    attention_of,
    compiled_names,
    family_of,
    several,
)
from diffusion_runtime.mil.package import open_package
from diffusion_runtime.mil.program import TensorType, operations

if TYPE_CHECKING:
    from diffusion_runtime.mil.model import Model
    from diffusion_runtime.mil.program import Feature, Function, Value

_SUFFIXES = {name: about.package or name for name, about in COMPONENTS.items() if about.several is None}
_CHUNKS = {component: (f"{_SUFFIXES[component]}_chunk1", f"{_SUFFIXES[component]}_chunk2") for component in CHUNKED}
_PACKAGE = re.compile(
    r"Stable_Diffusion_version_(?P<name>.+?)_(?P<suffix>"
    + "|".join([*_SUFFIXES.values(), *(name for names in _CHUNKS.values() for name in names)])
    + r")\.mlpackage"
)
_SCHEDULE: Mapping[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}


@dataclass(frozen=True, slots=True)
class Assumed:
    """What the user says of models without a manifest; None is the family's default."""

    prediction_type: str | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        known = ("epsilon", "v_prediction", "sample")
        if self.prediction_type not in (None, *known):
            raise InputError(f"prediction type {self.prediction_type!r}: expected one of {', '.join(known)}")
        if self.scale is not None and not 0 < self.scale < 100:
            raise InputError(f"latent scale {self.scale}: expected a positive number, mostly {LATENT_SCALE:g}")


@dataclass(frozen=True, slots=True)
class Described:
    """A manifest for a folder that has none. ``tokenizer`` is None where none was found."""

    manifest: Manifest
    tokenizer: Path | None
    notes: tuple[str, ...]


def holds_unet(folder: Path) -> bool:
    """Whether a folder holds a UNet under a name that Apple's tools give it."""
    return folder.is_dir() and _unet_in(_files(folder)) is not None


def _unet_in(components: Iterable[str]) -> str | None:
    """The UNet among components: the plain one, else the one that ControlNets steer."""
    return next((name for name in UNETS if name in components), None)


def describe(folder: Path, assumed: Assumed) -> Described:
    """The manifest of a folder that has none. Raises InputError and PackageError for missing and damaged models."""
    files = _files(folder)
    opened = {name: [open_package(folder / file).model for file in listed] for name, listed in files.items()}
    unet = _unet_in(files) or "unet"
    attention = attention_of(shape for model in opened[unet] for shape in _einsums(model))
    units = attention.about.compute_units
    components = {name: _component(folder, files[name], models, units) for name, models in opened.items()}
    inputs = {tensor.name: tensor.shape for tensor in components[unet].inputs}
    _check(folder, components, inputs)
    channels, *latents = inputs["sample"][1:]
    family = family_of(channels, inputs["encoder_hidden_states"][1], max(latents), "time_ids" in inputs)
    factor = _factor(components, inputs, family.latent_factor)
    prediction = assumed.prediction_type or family.prediction_types[0]
    scale = assumed.scale or family.latent_scale
    height, width = (size * factor for size in inputs["sample"][2:])
    tokenizer = next((place for place in _tokenizer_places(folder) if _holds_tokenizer(place)), None)
    made = Manifest(
        name=_name(folder),
        family=family.name,
        source=Source(name=_name(folder)),
        kind="packages" if files[unet][0].endswith(".mlpackage") else "compiled",
        attention=attention.value,
        height=height,
        width=width,
        batch_size=inputs["sample"][0],
        target="unknown",
        latents=Latents(channels=4, factor=factor, scale=scale),
        prediction_type=prediction,
        components=components,
        scheduler=_scheduler(family, prediction),
        force_zeros_for_empty_prompt=len(family.encoders) > 1,
        refiner=_refiner(components),
        controlnets={name: ControlNet(source=Source(name=name)) for name in several("controlnet", components)},
        requires_safety_checker=family.safety_checker,
        noise_scheduler=None if family.noise_scheduler is None else dict(family.noise_scheduler),
        tokenizer=None,
    )
    told = "as given" if assumed.prediction_type and assumed.scale else "where not given, the family's usual values"
    note = (
        f"{folder.name} has no manifest.json: taken for {family.name}, {width}x{height}, {prediction} prediction, "
        f"latent scale {scale:g}, {made.scheduler['_class_name'].removesuffix('Scheduler')} scheduler ({told})"
    )
    return Described(made, tokenizer, (note,))


def _scheduler(family: Family, prediction: str) -> dict[str, Any]:
    """As the family's checkpoints are published."""
    if family.added_conditions:
        own: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    else:
        own = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    return {**own, **_SCHEDULE, "prediction_type": prediction}


def _refiner(components: Mapping[str, Component]) -> Refiner | None:
    if "refiner" not in components:
        return None
    scheduler = _scheduler(FAMILIES["sdxl-refiner"], "epsilon")
    return Refiner(source=Source(name="unknown"), scheduler=scheduler, prediction_type="epsilon")


def _files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Component -> file names, chunks before the whole UNet as all apps prefer them."""
    chunks = ((component, compiled_names(component, len(names))) for component, names in _CHUNKS.items())
    found = {
        component: tuple(f"{name}.mlmodelc" for name in names)
        for component, names in [*((name, compiled_names(name)) for name in _SUFFIXES), *chunks]
        if all((folder / f"{name}.mlmodelc").is_dir() for name in names)
    }
    if _unet_in(found) or not folder.is_dir():
        return {**found, **_several(folder, "{compiled}/*.mlmodelc", "{prefix}")}
    matches = [match for path in sorted(folder.iterdir()) if (match := _PACKAGE.fullmatch(path.name))]
    names = sorted({match["name"] for match in matches})
    if len(names) > 1:
        raise InputError(f"{folder}: holds models of several checkpoints ({', '.join(names)}): one folder for each")
    components = {suffix: component for component, suffix in _SUFFIXES.items()}
    packages: dict[str, tuple[str, ...]] = {
        components.get(match["suffix"], match["suffix"]): (match[0],) for match in matches
    }
    for component, names_of_halves in _CHUNKS.items():
        halves = [packages.pop(name, ()) for name in names_of_halves]
        if all(halves):
            packages[component] = (*halves[0], *halves[1])
    return {**packages, **_several(folder, "{prefix}*.mlpackage", "")}


def _several(folder: Path, pattern: str, prefix: str) -> dict[str, tuple[str, ...]]:
    """The models of kinds of which there are several, as ControlNets, by component. Apple's converter has their
    packages with its others, and compiled ones in a folder of the kind, without the prefix."""
    found: dict[str, tuple[str, ...]] = {}
    for about in COMPONENTS.values():
        if about.several is not None:
            told = {"compiled": about.compiled, "prefix": about.several}
            for path in sorted(folder.glob(pattern.format(**told))):
                name = path.relative_to(folder).as_posix()
                found[prefix.format(**told) + path.stem] = (name,)
    return found


def _component(folder: Path, files: tuple[str, ...], models: list[Model], units: str) -> Component:
    """The interface of a chain of models as one: inputs that no earlier one gives, the last one's outputs."""
    given: set[str] = set()
    needed: dict[str, Tensor] = {}
    outputs: tuple[Tensor, ...] = ()
    for file, model in zip(files, models, strict=True):
        for tensor in _tensors(model.interface.inputs, folder / file):
            if tensor.name not in given:
                needed.setdefault(tensor.name, tensor)
        outputs = _tensors(model.interface.outputs, folder / file)
        given |= {tensor.name for tensor in outputs}
    return Component(
        files=files,
        inputs=tuple(needed.values()),
        outputs=outputs,
        compute_units=units,
        vocabulary_size=_vocabulary_size(models[0]) if "input_ids" in needed else None,
    )


def _vocabulary_size(model: Model) -> int | None:
    """The length of the table in which the numbers of a prompt's tokens are looked up, whatever is done to them
    before; None where there is no such table."""
    ids = {"input_ids"}
    for function in model.program.functions.values():
        for operation in operations(function.block):
            given = {key for key, bound in operation.inputs.items() for name in bound if _is_one(name, ids)}
            if operation.type == "gather" and "indices" in given:
                return _rows(function, operation.inputs["x"])
            if given:
                ids |= {output.name for output in operation.outputs}
    return None


def _is_one(binding: str | Value, names: set[str]) -> bool:
    return isinstance(binding, str) and binding in names


def _rows(function: Function, table: tuple[str | Value, ...]) -> int | None:
    known: dict[str, object] = {
        variable.name: variable.type for operation in operations(function.block) for variable in operation.outputs
    }
    kind = known.get(table[0]) if isinstance(table[0], str) else table[0].type
    return kind.shape[0] if isinstance(kind, TensorType) and len(kind.shape) == 2 else None


def _tensors(features: Sequence[Feature], path: Path) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name=s.name, dtype=s.dtype, shape=s.shape, shapes=s.shapes) for s in specs(features, path).values()
    )


def _check(folder: Path, components: Mapping[str, Component], inputs: Mapping[str, tuple[int, ...]]) -> None:
    encoder = (
        "text_encoder_2" if "text_embeds" in inputs else "text_encoder"
    )  # of a refiner alone, there is no first
    missing = [name for name in (encoder, "vae_decoder") if name not in components]
    if missing:
        raise InputError(f"{folder}: no {' and no '.join(missing)} next to the UNet: copy or convert it too")
    for name in ("sample", "encoder_hidden_states"):
        if len(inputs.get(name, ())) != 4:
            raise PackageError(f"{folder}: the UNet's input {name} is {inputs.get(name)}, expected four dimensions")


def _factor(components: Mapping[str, Component], inputs: Mapping[str, tuple[int, ...]], usual: int) -> int:
    """How much larger pictures are than latents, from whichever of the VAE's interfaces has a shape."""
    latent = inputs["sample"][2]
    shapes = [tensor.shape for tensor in components["vae_decoder"].outputs]
    if "vae_encoder" in components:
        shapes += [tensor.shape for tensor in components["vae_encoder"].inputs]
    sizes = [shape[2] // latent for shape in shapes if len(shape) == 4 and shape[2] % latent == 0]
    return next((size for size in sizes if size > 1), usual)


def einsum_shapes(function: Function) -> list[tuple[int | None, ...]]:
    """The shapes of the results of einsum operations."""
    types = [operation.outputs[0].type for operation in operations(function.block) if operation.type == "einsum"]
    return [kind.shape for kind in types if isinstance(kind, TensorType)]


def _einsums(model: Model) -> list[tuple[int | None, ...]]:
    return [shape for function in model.program.functions.values() for shape in einsum_shapes(function)]


def _tokenizer_places(folder: Path) -> tuple[Path, ...]:
    """Next to the models; or where the Hub's folders keep it: with the compiled variant of the same models."""
    beside = (folder, folder / "tokenizer", folder / "Resources", folder.parent, folder.parent / "tokenizer")
    return (*beside, folder.parent / "compiled", folder.parent / "Resources")


def _holds_tokenizer(place: Path) -> bool:
    """In either form: vocab.json with merges.txt, or tokenizer.json."""
    return any((place / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def _name(folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        if match := _PACKAGE.fullmatch(path.name):
            return match["name"]
    return folder.name
