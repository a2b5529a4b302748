"""A checkpoint in diffusers' layout: a folder with model_index.json and a folder per part."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import config_models, tensor_file
from diffusion_convert.checkpoint.family import of_transformer, of_unet
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.vocabulary import T5_FILES, TOKENIZER_FILES
from diffusion_runtime import strict_json
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import COMPONENTS
from diffusion_runtime.real_path import is_there

INDEX = "model_index.json"
CARD = "README.md"
APART = ("image_encoder", "image_projection")
"""Networks that options of convert add: a pipeline saved with an IP-Adapter has the first, but not the rest."""
NETWORKS = tuple(
    dict.fromkeys(
        names.subfolder for names in COMPONENTS.values() if names.several is None and names.subfolder not in APART
    )
)
SCHEDULERS = ("scheduler", "low_res_scheduler")
REQUIRED = ("vae", "scheduler")
DENOISERS = ("unet", "transformer")
"""One of them is in every pipeline."""
TOKENIZERS = {
    name: name.replace("tokenizer", "text_encoder") for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
}
"""The subfolder of each one's text encoder."""
T5_PARTS = ("text_encoder_3", "tokenizer_3")
"""What Stable Diffusion 3 may be converted without."""
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
KINDS = ("safetensors", "bin")
"""In order of preference: no code before code."""
HALF = "fp16"
"""The variant that is taken before files without one: half the bytes."""
_VARIANT = re.compile(
    rf"(?:{'|'.join(STEMS)})(?:-\d+-of-\d+)?\.(?:(\w+)(?:-\d+-of-\d+)?\.(?:{'|'.join(KINDS)})(?:\.index\.json)?"
    rf"|(?:{'|'.join(KINDS)})\.index\.(\w+)\.json)"
)
LEFT_OUT: Mapping[str, str] = {
    "controlnet": "a ControlNet, which is given with --controlnet as well",
    "image_encoder": "an image encoder, for prompts that are pictures",
    "adapter": "a T2I-Adapter, which --t2i-adapter takes along",
    "prior": "a prior, which makes image embeddings of prompts",
    "motion_adapter": "a motion adapter, for videos",
}
"""Parts of pipelines that other pipelines than those of the families have."""


def open_folder(
    folder: Path,
    source: Source,
    family: str | None = None,
    variant: str | None = None,
    without: Collection[str] = (),
) -> Checkpoint:
    """The checkpoint in ``folder``. No weight is read. ``variant``: see `weight_files`; of parts that have it.
    ``without``: parts that are left out, as if the index did not name them.

    Raises CheckpointError, with all that is missing, and InputError for a variant that no part has."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder}: not a checkpoint in diffusers' layout: it has no {INDEX}; expected such a folder, the id "
            "of a repository on the Hugging Face Hub, or a single .safetensors or .ckpt file; for a UNet alone, "
            "--base gives the rest"
        )
    index = read_json(folder / INDEX)
    named = {name: value for name, value in index.items() if _is_part(value) and name not in without}
    parts = {name: value for name, value in named.items() if (folder / name).is_dir()}
    denoiser = _denoiser(folder, named, parts, family)
    classes = {name: str(value[1]) for name, value in parts.items()}
    models = {name: read_submodel(folder / name, classes[name], variant) for name in NETWORKS if name in parts}
    check_variant(folder, models, variant)
    # Of the class that the index names, as in diffusers, whatever class wrote the configuration.
    schedulers = {
        name: {**read_json(folder / name / "scheduler_config.json"), "_class_name": classes[name]}
        for name in SCHEDULERS
        if name in parts
    }
    if denoiser == DENOISERS[0]:
        found = of_unet(models["unet"].config, schedulers["scheduler"], family, str(folder), models)
    else:
        found = of_transformer(models[denoiser].class_name, family, str(folder))
    return Checkpoint(
        name=source.name,
        family=found,
        source=source,
        models=models,
        schedulers=schedulers,
        tokenizers={TOKENIZERS[name]: _tokenizer(folder / name) for name in TOKENIZERS if name in parts},
        pipeline_config={name: value for name, value in index.items() if not _is_part(value)},
        notes=tuple(_notes(folder, named, models, variant)),
    )


def _denoiser(folder: Path, named: Mapping[str, Any], parts: Collection[str], family: str | None) -> str:
    """The part that is the UNet or what stands for it. Raises CheckpointError for all that is missing."""
    denoiser = next((name for name in DENOISERS if name in named), DENOISERS[0])
    if denoiser != DENOISERS[0]:  # said before any file of it is missed: most pipelines have some transformer
        of_transformer(str(named[denoiser][1]), family, str(folder))
    missing = [name for name in (denoiser, *REQUIRED, *_text_parts(named)) if name not in parts]
    if missing:
        raise CheckpointError(f"{folder}: it lacks {', '.join(missing)} (it has {', '.join(sorted(parts))})")
    return denoiser


def _notes(
    folder: Path, named: Collection[str], models: Mapping[str, Submodel], variant: str | None
) -> Iterator[str]:
    for name in NETWORKS:
        if name in named and name not in models:
            yield f"{INDEX} names a {name}, but there is no such folder: made without it"
    for name, what in LEFT_OUT.items():
        if name in named:
            yield f"{folder.name} has {what}; made without it"
    for name, model in models.items():
        for taken in variants(file.name for file in model.files) - {variant, HALF}:
            yield f"{name} has weights of the variant {taken} only: those are taken"


def check_variant(folder: Path, models: Mapping[str, Submodel], variant: str | None) -> None:
    """Raises InputError for a variant that none of ``models``, by their folders in ``folder``, has."""
    if variant is None or any(
        variant in variants([file.name]) for model in models.values() for file in model.files
    ):
        return
    found = {one for name in models for one in variants(path.name for path in (folder / name).iterdir())}
    raise InputError(
        f"--variant {variant}: {folder} has no such weights; it has {', '.join(sorted(found)) or 'no variants'}"
    )


def _text_parts(named: Collection[str]) -> tuple[str, ...]:
    """The text encoders and tokenizers that must be there: SDXL has two of each, its refiner only the second,
    Stable Diffusion 3 three."""
    numbers = [number for number in ("", "_2", "_3") if f"text_encoder{number}" in named] or [""]
    return tuple(f"{part}{number}" for number in numbers for part in ("text_encoder", "tokenizer"))


def _tokenizer(folder: Path) -> dict[str, Path]:
    files = T5_FILES if folder.name in T5_PARTS else TOKENIZER_FILES
    return {name: path for name in files if is_there(path := folder / name, CheckpointError)}


def part_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that a model_index.json names: its folders."""
    return tuple(name for name, value in index.items() if _is_part(value))


def read_license(folder: Path) -> str | None:
    """The license that the model card of a checkpoint names, if there is one."""
    try:
        if not (folder / CARD).is_file():  # a pipe would be waited for, a device has no end
            return None
        lines = (folder / CARD).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        key, colon, value = line.partition(":")
        if line.strip() == "---":
            break
        if colon and key == "license":
            return value.strip().strip("\"'") or None
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where it is missing or damaged."""
    return strict_json.read_object(path, CheckpointError)


def weight_files(
    names: Collection[str], read_index: Callable[[str], Mapping[str, Any]], variant: str | None = None
) -> tuple[str, ...]:
    """The files that hold a network's weights, the best of ``names``: one, or the shards that an index lists, which
    ``read_index`` reads. Empty where there are none.

    ``variant`` is that of diffusers ("non_ema": diffusion_pytorch_model.non_ema.safetensors), in place of files
    without one; those are taken where it is not there. Without it: half the bytes before all of them, code last. A
    variant that is all that there is is taken. Raises CheckpointError where there are several.
    """
    for one, kind in _preferences(names, variant):
        for stem in STEMS:
            name = f"{stem}.{one}.{kind}" if one else f"{stem}.{kind}"
            if name in names:
                return (name,)
            # diffusers wrote model.safetensors.index.fp16.json as well as model.fp16.safetensors.index.json
            indices = [f"{stem}.{kind}.index.{one}.json"] if one else []
            for index in (*indices, f"{name}.index.json"):
                if index in names:
                    return _shards(index, read_index(index))
    return ()


def _preferences(names: Collection[str], variant: str | None) -> Iterator[tuple[str, str]]:
    if variant:
        yield from ((variant, kind) for kind in KINDS)
        yield from (("", kind) for kind in KINDS)
    else:
        yield from ((one, kind) for kind in KINDS for one in (HALF, ""))
    others = sorted(variants(names) - {HALF})
    if len(others) > 1:
        raise CheckpointError(
            f"weights of several variants, and none without a name: {', '.join(others)}; --variant chooses"
        )
    yield from ((one, kind) for one in (*others, HALF) for kind in KINDS)


def variants(names: Iterable[str]) -> set[str]:
    """The names of variants among a network's files."""
    return {found for name in names if (match := _VARIANT.fullmatch(name)) and (found := match[1] or match[2])}


def _shards(name: str, index: Mapping[str, Any]) -> tuple[str, ...]:
    places = index.get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{name}: expected a weight_map of tensors to files")
    files = tuple(sorted(set(places.values())))
    if outside := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{name}: names a file {outside[0]!r} outside of its folder; refused")
    return files


def _is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[1] is not None


def read_network(folder: Path, what: str, *classes: str) -> Submodel:
    """The network in a folder, ``what`` its user calls it, of one of the ``classes``. Raises CheckpointError."""
    found = read_json(folder / "config.json").get("_class_name")
    if found not in classes:
        raise CheckpointError(
            f"{folder}: no {what}: its config.json is of class {found}: expected {' or '.join(classes)}"
        )
    return read_submodel(folder, str(found))


def read_submodel(folder: Path, class_name: str, variant: str | None = None) -> Submodel:
    """The network in a folder, config.json next to its weights. No weight is read. Raises CheckpointError."""
    config = config_models.checked(class_name, read_json(folder / "config.json"), str(folder / "config.json"))
    try:
        names = weight_files(
            {path.name for path in folder.iterdir()}, lambda name: read_json(folder / name), variant
        )
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        expected = ", ".join(missing) or f"{STEMS[0]}.safetensors, {STEMS[1]}.safetensors or the like"
        raise CheckpointError(f"{folder}: weights are missing: {expected}")
    files = tuple(folder / name for name in names)
    return Submodel(class_name, config, partial(_read, files), files)


def _read(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= tensor_file.read(path).tensors
    return tensors
