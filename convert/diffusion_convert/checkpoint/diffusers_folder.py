"""A checkpoint in diffusers' layout: a folder with model_index.json and a folder per part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint import config_models, tensor_file
from diffusion_convert.checkpoint.family import check_family, detect, refuse_other_kinds
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.vocabulary import TOKENIZER_FILES
from diffusion_runtime import strict_json
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError
from diffusion_runtime.families import COMPONENTS

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
CARD = "README.md"
NETWORKS = tuple(dict.fromkeys(names.subfolder for names in COMPONENTS.values()))
SCHEDULERS = ("scheduler", "low_res_scheduler")
REQUIRED = ("text_encoder", "unet", "vae", "scheduler", "tokenizer")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".fp16.safetensors", ".safetensors", ".fp16.bin", ".bin")
"""In order of preference: no code before code, half the bytes before all of them."""


def open_folder(folder: Path, source: Source, family: str | None = None) -> Checkpoint:
    """The checkpoint in ``folder``. No weight is read. Raises CheckpointError, with all that is missing."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder}: not a checkpoint in diffusers' layout: it has no {INDEX}; expected such a folder, the id "
            "of a repository on the Hugging Face Hub, or a single .safetensors or .ckpt file"
        )
    index = read_json(folder / INDEX)
    named = {name: value for name, value in index.items() if _is_part(value)}
    parts = {name: value for name, value in named.items() if (folder / name).is_dir()}
    missing = [name for name in REQUIRED if name not in parts]
    if missing:
        raise CheckpointError(f"{folder}: it lacks {', '.join(missing)} (it has {', '.join(sorted(parts))})")
    absent = [name for name in NETWORKS if name in named and name not in parts]
    models = {name: read_submodel(folder / name, str(parts[name][1])) for name in NETWORKS if name in parts}
    schedulers = {
        name: {**read_json(folder / name / "scheduler_config.json"), "_class_name": str(parts[name][1])}
        for name in SCHEDULERS
        if name in parts
    }  # of the class that the index names, as in diffusers, whatever class wrote the configuration
    unet = models["unet"].config
    refuse_other_kinds(unet, str(folder))
    if family is not None:
        found = check_family(family, unet, str(folder))
    else:
        found = detect(unet, schedulers["scheduler"], str(folder))
    return Checkpoint(
        name=source.name,
        family=found,
        source=source,
        models=models,
        schedulers=schedulers,
        tokenizer={name: path for name in TOKENIZER_FILES if (path := folder / "tokenizer" / name).is_file()},
        pipeline_class=str(index.get("_class_name", "StableDiffusionPipeline")),
        pipeline_config={name: value for name, value in index.items() if not _is_part(value)},
        notes=tuple(f"{INDEX} names a {name}, but there is no such folder: made without it" for name in absent),
    )


def part_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that a model_index.json names: its folders."""
    return tuple(name for name, value in index.items() if _is_part(value))


def read_license(folder: Path) -> str | None:
    """The license that the model card of a checkpoint names, if there is one."""
    try:
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


def weight_files(names: Callable[[str], bool], read_index: Callable[[str], Mapping[str, Any]]) -> tuple[str, ...]:
    """The files that hold a network's weights, the best there are: one, or the shards that an index lists.

    ``names`` tells whether a file is there, ``read_index`` reads one. Empty where there are none.
    """
    for suffix in SUFFIXES:
        for stem in STEMS:
            if names(f"{stem}{suffix}"):
                return (f"{stem}{suffix}",)
            for index in _index_names(stem, suffix):
                if names(index):
                    return _shards(index, read_index(index))
    return ()


def _shards(name: str, index: Mapping[str, Any]) -> tuple[str, ...]:
    places = index.get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{name}: expected a weight_map of tensors to files")
    files = tuple(sorted(set(places.values())))
    if outside := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{name}: names a file {outside[0]!r} outside of its folder; refused")
    return files


def _index_names(stem: str, suffix: str) -> tuple[str, ...]:
    """diffusers wrote ``model.safetensors.index.fp16.json`` as well as ``model.fp16.safetensors.index.json``."""
    if not suffix.startswith(".fp16"):
        return (f"{stem}{suffix}.index.json",)
    plain = suffix.removeprefix(".fp16")
    return (f"{stem}{plain}.index.fp16.json", f"{stem}{suffix}.index.json")


def _is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[1] is not None


def read_submodel(folder: Path, class_name: str) -> Submodel:
    """The network in a folder, config.json beside its weights. No weight is read. Raises CheckpointError."""
    config = config_models.checked(class_name, read_json(folder / "config.json"), str(folder / "config.json"))
    files = weight_files(lambda name: (folder / name).is_file(), lambda name: read_json(folder / name))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        expected = ", ".join(missing) or f"{STEMS[0]}.safetensors, {STEMS[1]}.safetensors or the like"
        raise CheckpointError(f"{folder}: weights are missing: {expected}")
    return Submodel(class_name, config, partial(_read, tuple(folder / name for name in files)))


def _read(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= tensor_file.read(path).tensors
    return tensors
