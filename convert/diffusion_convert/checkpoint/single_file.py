"""A checkpoint in one .safetensors, .ckpt or .gguf file, in CompVis (LDM) layout, opened offline.

What the networks are is in the shapes and in our own data (`ldm_configs`); what the weights are called follows
diffusers' mapping (`ldm_names`). The file carries no tokenizer: ``vocab.json`` and ``merges.txt`` next to it or in
a folder ``tokenizer`` there are taken, else CLIP's, which every published Stable Diffusion checkpoint uses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import (
    config_models,
    diffusers_unet,
    gguf_file,
    ldm_configs,
    ldm_family,
    ldm_marks,
    ldm_names,
    ldm_shapes,
    scaled,
    tensor_file,
    torch_networks,
)
from diffusion_convert.checkpoint.computed import TensorFile
from diffusion_convert.checkpoint.diffusers_folder import LEFT_OUT, SCHEDULERS
from diffusion_convert.checkpoint.ldm_layout import (
    NETWORKS,
    OTHER_LAYOUTS,
    SD3_NETWORKS,
    Network,
    only_averaged,
    split,
    unwrapped,
)
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.vocabulary import FAST, SENTENCEPIECE, T5_FILES, TOKENIZER_FILES
from diffusion_runtime.bundle.integrity import sha256
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import COMPONENTS, FAMILIES, T5, TEXT_ENCODERS
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES
from diffusion_runtime.real_path import is_there

CLIP_VOCABULARY_SIZE = 49408
SD3, T5_SUBFOLDER = "sd3", COMPONENTS[T5].subfolder
_CONTROL = "control_model."
GIVEN_BY = {"vae": "--vae or --base", "text encoder": "--base"}
"""What a file may lack, and the option that gives it."""


def open_single_file(
    path: Path, family: str | None = None, without_vae: bool = False, base: Checkpoint | None = None
) -> Checkpoint:
    """The checkpoint in a file. Weights stay in the file: each call of a submodel's ``tensors`` maps it anew.

    ``family`` decides what the file does not. ``without_vae``: the file needs none, as another is put in. ``base``
    gives what the file lacks, and the tokenizer. Raises CheckpointError for a file that is damaged, incomplete or
    of another kind, InputError for a family that contradicts the file.
    """
    file = _read(path)
    parts = split(file.tensors)
    if "mmdit" in parts:
        return _open_sd3(path, parts, family, without_vae, base)
    _check_layout(path, file.tensors, parts, without_vae, base)
    given = ldm_configs.read_beside(path)
    if diffusers_unet.is_one(file.tensors):
        given = ldm_configs.merge({"unet": diffusers_unet.config_beside(path)}, given)
    _check_noise_levels(path, file.tensors, given)
    marks = ldm_marks.read(path, file, settled="prediction_type" in given.get("scheduler", {}))
    if ldm_shapes.GUIDANCE in parts["unet"]:
        marks = replace(marks, few_steps="lcm")
    found, notes = ldm_family.detect(path, parts, family, marks, file.scalars, given, base)
    data = ldm_configs.family_data(found)
    if base is not None:
        data = _with_unet_of(base, parts["unet"], data)
    schedulers = {name: data[name] for name in SCHEDULERS if name in data}
    if base is not None and base.family == found:
        schedulers = dict(base.schedulers)
        data = {**data, "pipeline_config": base.pipeline_config}
    beside = ldm_configs.merge({"scheduler": marks.scheduler(schedulers["scheduler"])}, given)
    models = _models(path, parts, FAMILIES[found].encoders, data, beside, base)
    if parts["unet"]["input_blocks.0.0.weight"].shape[1] == 5 and "depth_estimator" not in models:
        raise CheckpointError(f"{path}: its UNet takes depth, but the depth estimator (depth_model.) is missing")
    return Checkpoint(
        name=diffusers_unet.name_of(path),
        family=found,
        source=Source(name=path.name, sha256=sha256(path)),
        models=models,
        schedulers={name: ldm_configs.merge(config, beside.get(name, {})) for name, config in schedulers.items()},
        tokenizers=_tokenizers(path, data, models, base),
        pipeline_config=data.get("pipeline_config", {}),
        notes=(*notes, *_notes(path, file, parts, data, given), *_few_steps(path, marks, given)),
    )


def _open_sd3(
    path: Path,
    parts: Mapping[str, ldm_shapes.Tensors],
    family: str | None,
    without_vae: bool,
    base: Checkpoint | None,
) -> Checkpoint:
    """Stable Diffusion 3: the transformer and the VAE, and in some files the text encoders. T5's tokenizer is in no
    file: without a folder ``tokenizer_3`` beside it, or a base that has one, T5 is left out."""
    if family not in (None, SD3):
        raise InputError(f"{path}: family {family!r} does not fit a Stable Diffusion 3 model: expected {SD3}")
    if base is not None and base.family != SD3:
        raise InputError(f"--base {base.source.name}: is {base.family}, but {path} is {SD3}")
    data, beside = ldm_configs.family_data(SD3), ldm_configs.read_beside(path)
    models = dict(base.models) if base is not None else {}
    for network in SD3_NETWORKS:
        if network.kind in parts:
            models[network.subfolder] = submodel(path, network, parts[network.kind], data, beside)
    needed = ("vae", *FAMILIES[SD3].encoders)[int(without_vae) :]
    if missing := [name for name in needed if name not in models]:
        raise CheckpointError(f"{path}: has no {' and no '.join(missing)}: give what is missing with --base")
    own = _tokenizers(path, data, models, None) if base is None else base.tokenizers
    tokenizers = {**own, **_t5_tokenizer(path)}
    notes: tuple[str, ...] = ()
    if T5_SUBFOLDER not in tokenizers and models.pop(T5_SUBFOLDER, None) is not None:
        notes = (
            f"{path.name} has T5 without its tokenizer: made without T5; a folder tokenizer_3 beside the file, or "
            "--base, gives it",
        )
    scheduler = data["scheduler"] if base is None else base.schedulers["scheduler"]
    return Checkpoint(
        name=path.stem,
        family=SD3,
        source=Source(name=path.name, sha256=sha256(path)),
        models=models,
        schedulers={"scheduler": ldm_configs.merge(scheduler, beside.get("scheduler", {}))},
        tokenizers=tokenizers,
        notes=notes,
    )


def _t5_tokenizer(path: Path) -> dict[str, Mapping[str, Path]]:
    folder = path.parent / "tokenizer_3"
    there = {name: folder / name for name in T5_FILES if is_there(folder / name, CheckpointError)}
    return {T5_SUBFOLDER: there} if there.keys() & {FAST, SENTENCEPIECE} else {}


def _with_unet_of(base: Checkpoint, unet: ldm_shapes.Tensors, data: dict[str, Any]) -> dict[str, Any]:
    """The family's data, with what no shape shows of a UNet (heads, activations) as the base's has it: where that
    has the same widths, the file's was trained from it."""
    own, sized = base.models["unet"].config, ldm_shapes.unet(unet)
    alike = (
        list(own.get("block_out_channels", ())) == list(sized["block_out_channels"])
        and own["cross_attention_dim"] == sized["cross_attention_dim"]
        and bool(own.get("use_linear_projection")) == sized["use_linear_projection"]
    )
    rules = {key: rule for key, rule in data.get("rules", {}).items() if key not in ldm_configs.UNET_RULES}
    return {**data, "unet": {**data["unet"], **own}, "rules": rules} if alike else data


def _models(
    path: Path,
    parts: Mapping[str, ldm_shapes.Tensors],
    encoders: Collection[str],
    data: Mapping[str, Any],
    beside: ldm_configs.Sections,
    base: Checkpoint | None,
) -> dict[str, Submodel]:
    """The file's networks, and the base's in place of those that it lacks; text encoders only as the family's."""
    given = base.models if base is not None else {}
    models = {name: model for name, model in given.items() if name in encoders or not name.startswith("text_")}
    for network in NETWORKS:
        other = network.subfolder.startswith("text_") and network.subfolder not in encoders
        if network.kind in parts and not other:
            models[network.subfolder] = submodel(path, network, parts[network.kind], data, beside)
    if missing := [name for name in encoders if name not in models]:
        raise CheckpointError(f"{path}: has no {' and no '.join(missing)}: give what is missing with --base")
    return models


def _tokenizers(
    path: Path, data: Mapping[str, Any], models: Mapping[str, Submodel], base: Checkpoint | None
) -> dict[str, Mapping[str, Path]]:
    """`Checkpoint.tokenizers`."""
    encoders = [name for name in TEXT_ENCODERS if name in models]
    if base is not None:
        return {name: base.tokenizers[name] for name in encoders}
    folders = {name: name.replace("text_encoder", "tokenizer") for name in encoders}
    return {
        name: _clip_tokenizer(path, folder, data[folder], models[name].config["vocab_size"])
        for name, folder in folders.items()
    }


def _few_steps(path: Path, marks: ldm_marks.Marks, given: ldm_configs.Sections) -> tuple[str, ...]:
    if marks.few_steps is None or "_class_name" in given.get("scheduler", {}):
        return ()
    about = ldm_marks.FEW_STEPS[marks.few_steps]
    return (
        f"{path.name} is taken for a model of few steps ({marks.few_steps}): its scheduler is "
        f"{about['_class_name']} with {about['timestep_spacing']} timesteps "
        f"({path.with_suffix('.config.json').name} can say otherwise); draw with --steps 4 to 8"
        + ("" if marks.few_steps == "lcm" else " and --guidance-scale 1"),
    )


def _notes(
    path: Path,
    file: TensorFile,
    parts: Mapping[str, ldm_shapes.Tensors],
    data: Mapping[str, Any],
    given: ldm_configs.Sections,
) -> tuple[str, ...]:
    found = []
    if only_averaged(file.tensors):
        found.append(f"{path.name} has only the weights that training averaged (model_ema): those are used")
    if any(name.startswith(_CONTROL) for name in file.tensors):
        found.append(f"{path.name} has {LEFT_OUT['controlnet']} ({_CONTROL}): left out")
    layer, kind = (
        given.get(ldm_configs.TEXT_LAYER, {}),
        next((kind for kind in ldm_family.TEXT_KINDS if kind in parts), None),
    )
    if kind is not None and ldm_configs.skips(kind, parts[kind], data, layer):
        told = ", ".join(f"{key} {value}" for key, value in layer.items())
        found.append(
            f"{path.with_suffix('.yaml').name} asks for other states of the text encoder than usual ({told}): the "
            "layers after those are left out and the last norm is kept, as web interfaces do for clip skip"
        )
    return tuple(found)


def submodel(
    path: Path,
    network: Network,
    part: ldm_shapes.Tensors,
    data: Mapping[str, Any],
    beside: ldm_configs.Sections,
) -> Submodel:
    """One network of a file, checked to be whole. ``part`` is what `split` found of it."""
    weights, scales = scaled.apart(part)
    try:
        config = ldm_configs.config(network.kind, network.subfolder, weights, data, beside)
        config = config_models.checked(network.class_name, config, network.subfolder)
        mapped = _mapped(network.kind, weights, config)
        if network.kind == "unet":
            _check_all_used(weights, mapped)
        scaled.scaled(mapped, weights, scales)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    found = Submodel(network.class_name, config, partial(_map_tensors, path, network.kind, config), (path,))
    torch_networks.check(found, mapped, f"{path}: {network.subfolder}")
    return found


def _mapped(kind: str, part: ldm_shapes.Tensors, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    try:
        mapped = ldm_names.NAMES[kind](part, config)
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"weights of unexpected names or shapes: {error}".splitlines()[0]) from error
    if lost := [name for name, value in mapped.items() if value is None]:  # diffusers' way to say so
        raise CheckpointError(f"weights are missing: {torch_networks.listed(lost)}")
    whole = {id(value) for value in part.values()}
    if apart := [name for name, value in mapped.items() if value.is_meta and id(value) not in whole]:
        raise CheckpointError(
            f"quantised weights that would have to be taken apart: {torch_networks.listed(apart)}"
        )
    return mapped


def _map_tensors(path: Path, kind: str, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    file = _read(path)
    weights, scales = scaled.apart(split(file.tensors)[kind])
    return file.decoded(scaled.scaled(ldm_names.NAMES[kind](weights, config), weights, scales))


def _read(path: Path) -> TensorFile:
    if gguf_file.is_one(path):
        return gguf_file.read(path)
    file = tensor_file.read(path)
    return replace(file, tensors=unwrapped(file.tensors))


def _check_all_used(part: ldm_shapes.Tensors, mapped: ldm_shapes.Tensors) -> None:
    """A UNet with something more than the family's has another meaning: nothing of it is left out in silence."""
    used = {id(value) for value in mapped.values()}
    if left := [name for name, value in part.items() if id(value) not in used]:
        raise CheckpointError(f"its UNet has parts that no covered family has: {torch_networks.listed(left)}")


def _check_noise_levels(path: Path, tensors: ldm_shapes.Tensors, given: ldm_configs.Sections) -> None:
    edm = [name for name in ldm_marks.EDM if name in tensors]
    if edm and "_class_name" not in given.get("scheduler", {}):
        raise CheckpointError(
            f"{path}: has {edm[0]}, so its noise levels are EDM's (Playground v2.5, CosXL), which a file does not "
            f"tell: give its diffusers folder, or scheduler and VAE in {path.with_suffix('.config.json').name}"
        )


def _check_layout(
    path: Path,
    tensors: ldm_shapes.Tensors,
    parts: Mapping[str, ldm_shapes.Tensors],
    without_vae: bool,
    base: Checkpoint | None,
) -> None:
    """Raises CheckpointError for a file that lacks a network that nothing else gives."""
    there = {"text encoder" if kind.removesuffix("_2") in ldm_family.TEXT_KINDS else kind for kind in parts}
    there |= {"vae"} if without_vae or base is not None else set()
    there |= {"text encoder"} if base is not None else set()
    missing = [kind for kind in ("unet", "vae", "text encoder") if kind not in there]
    if not missing:
        return
    for prefix, what in OTHER_LAYOUTS.items():
        of_unet = prefix.startswith(NETWORKS[0].prefixes)  # of another network, by the names that a UNet has
        if ("unet" in missing or of_unet) and any(name.startswith(prefix) for name in tensors):
            raise CheckpointError(f"{path}: this is {what}")
    what = "expected a checkpoint in CompVis layout"
    if "unet" not in missing:
        what = f"give {'one' if len(missing) == 1 else 'them'} with {GIVEN_BY[missing[-1]]}"
    raise CheckpointError(f"{path}: has no {' and no '.join(missing)}: {what}")


def _clip_tokenizer(path: Path, name: str, settings: str, vocabulary_size: int) -> dict[str, Path]:
    """Files by name: those next to the checkpoint or in a folder ``name`` there, else CLIP's vocabulary with the
    family's settings."""
    for folder in (path.parent / name, path.parent):
        there = {name: folder / name for name in TOKENIZER_FILES if is_there(folder / name, CheckpointError)}
        if "tokenizer.json" in there or there.keys() >= set(VOCABULARY_FILES):
            return _files(ldm_configs.FOLDER / "clip" / settings) | there
    if vocabulary_size < CLIP_VOCABULARY_SIZE:
        raise CheckpointError(
            f"{path}: its text encoder knows {vocabulary_size} tokens, CLIP's tokenizer {CLIP_VOCABULARY_SIZE}: "
            f"put its vocab.json and merges.txt next to it, or into a folder `{name}` there"
        )
    clip = ldm_configs.FOLDER / "clip"
    return {"vocab.json": clip / "vocab.json", "merges.txt": clip / "merges.txt"} | _files(clip / settings)


def _files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir())}
