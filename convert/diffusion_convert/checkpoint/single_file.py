"""A checkpoint in one .safetensors or .ckpt file, in CompVis (LDM) layout, opened offline.

What the networks are is in the shapes and in our own data (`ldm_configs`); what the weights are called follows
diffusers' mapping (`ldm_names`). The file carries no tokenizer: ``vocab.json`` and ``merges.txt`` beside it or in a
folder ``tokenizer`` beside it are taken, else CLIP's, which every published Stable Diffusion checkpoint uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint import (
    config_models,
    ldm_configs,
    ldm_marks,
    ldm_names,
    ldm_shapes,
    tensor_file,
    torch_networks,
)
from diffusion_convert.checkpoint.diffusers_folder import SCHEDULERS
from diffusion_convert.checkpoint.ldm_layout import NETWORKS, OTHER_LAYOUTS, Network, only_averaged, split
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.vocabulary import TOKENIZER_FILES
from diffusion_runtime.bundle.integrity import sha256
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES, TEXT_WIDTHS
from diffusion_runtime.prompt.tokenizer import VOCABULARY_FILES

if TYPE_CHECKING:
    import torch

CLIP_VOCABULARY_SIZE = 49408
TELLING_BIAS, MIN_V_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
BASE_GLOBAL_STEP = 875_000
"""``global_step`` of the official 512-base-ema.ckpt, by which diffusers, too, knows the epsilon model of SD 2."""


TEXT_KINDS = ("clip", "open_clip")
"""The kinds of text encoders: CLIP ViT-L of Stable Diffusion 1, OpenCLIP ViT-H of 2."""
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
    file = tensor_file.read(path)
    parts = split(file.tensors)
    _check_layout(path, file.tensors, parts, without_vae, base)
    given = ldm_configs.read_beside(path)
    marks = ldm_marks.read(path, file, settled="prediction_type" in given.get("scheduler", {}))
    found, notes = _family(path, parts, family, marks, file.scalars, given, base)
    data = ldm_configs.family_data(found)
    schedulers = {name: data[name] for name in SCHEDULERS if name in data}
    if base is not None and base.family == found:
        schedulers = dict(base.schedulers)
    beside = ldm_configs.merge({"scheduler": marks.scheduler(schedulers["scheduler"])}, given)
    models = dict(base.models) if base is not None else {}
    models |= {
        network.subfolder: submodel(path, network, parts[network.kind], data, beside)
        for network in NETWORKS
        if network.kind in parts
    }
    if parts["unet"]["input_blocks.0.0.weight"].shape[1] == 5 and "depth_estimator" not in models:
        raise CheckpointError(f"{path}: its UNet takes depth, but the depth estimator (depth_model.) is missing")
    return Checkpoint(
        name=path.stem,
        family=found,
        source=Source(name=path.name, sha256=sha256(path)),
        models=models,
        schedulers={name: ldm_configs.merge(config, beside.get(name, {})) for name, config in schedulers.items()},
        tokenizer=base.tokenizer
        if base is not None
        else _tokenizer(path, data["tokenizer"], models["text_encoder"].config["vocab_size"]),
        pipeline_class=data["pipeline_class"],
        pipeline_config=data.get("pipeline_config", {}),
        notes=(*notes, *_notes(path, file, parts, data, given)),
    )


def _notes(
    path: Path,
    file: tensor_file.TensorFile,
    parts: Mapping[str, ldm_shapes.Tensors],
    data: Mapping[str, Any],
    given: ldm_configs.Sections,
) -> tuple[str, ...]:
    found = []
    if only_averaged(file.tensors):
        found.append(f"{path.name} has only the weights that training averaged (model_ema): those are used")
    layer, kind = given.get(ldm_configs.TEXT_LAYER, {}), next((kind for kind in TEXT_KINDS if kind in parts), None)
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
    try:
        config = ldm_configs.config(network.kind, network.subfolder, part, data, beside)
        config = config_models.checked(network.class_name, config, network.subfolder)
        mapped = _mapped(network.kind, part, config)
        if network.kind == "unet":
            _check_all_used(part, mapped)
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
    return mapped


def _map_tensors(path: Path, kind: str, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    return ldm_names.NAMES[kind](split(tensor_file.read(path).tensors)[kind], config)


def _check_all_used(part: ldm_shapes.Tensors, mapped: ldm_shapes.Tensors) -> None:
    """A UNet with something more than the family's has another meaning: nothing of it is left out in silence."""
    used = {id(value) for value in mapped.values()}
    if left := [name for name, value in part.items() if id(value) not in used]:
        raise CheckpointError(f"its UNet has parts that no covered family has: {torch_networks.listed(left)}")


def _check_layout(
    path: Path,
    tensors: ldm_shapes.Tensors,
    parts: Mapping[str, ldm_shapes.Tensors],
    without_vae: bool,
    base: Checkpoint | None,
) -> None:
    """Raises CheckpointError for a file that lacks a network that nothing else gives."""
    there = {"text encoder" if kind in TEXT_KINDS else kind for kind in parts}
    there |= {"vae"} if without_vae or base is not None else set()
    there |= {"text encoder"} if base is not None else set()
    missing = [kind for kind in ("unet", "vae", "text encoder") if kind not in there]
    if not missing:
        return
    for prefix, what in OTHER_LAYOUTS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise CheckpointError(f"{path}: this is {what}")
    what = "expected a checkpoint in CompVis layout"
    if "unet" not in missing:
        what = f"give {'one' if len(missing) == 1 else 'them'} with {GIVEN_BY[missing[-1]]}"
    raise CheckpointError(f"{path}: has no {' and no '.join(missing)}: {what}")


def _family(
    path: Path,
    parts: Mapping[str, ldm_shapes.Tensors],
    asked: str | None,
    marks: ldm_marks.Marks,
    scalars: Mapping[str, int | float | str],
    beside: ldm_configs.Sections,
    base: Checkpoint | None,
) -> tuple[str, tuple[str, ...]]:
    """The family and, where it was not certain, a sentence that says so."""
    unet, first = parts["unet"], "input_blocks.0.0.weight"
    channels = unet[first].shape[1] if first in unet and unet[first].ndim == 4 else 0
    one_encoder = [family for family in FAMILIES.values() if not family.added_conditions]
    takes = [family for family in one_encoder if family.in_channels == channels]
    if not takes:
        known = ", ".join(sorted({str(family.in_channels) for family in one_encoder}))
        raise CheckpointError(f"{path}: a UNet with {channels} input channels; known are {known}")
    says, certain = _text_encoder(parts, marks)
    fits = [family for family in takes if {family.text_encoder} == set(says.values())]
    if asked is not None:
        accepted = [family.name for family in (fits if certain and fits else takes)]
        if asked not in accepted:
            raise InputError(
                f"{path}: family {asked!r} does not fit a file with {channels} input channels and "
                f"{' and '.join(says)}: expected {' or '.join(accepted)}"
            )
        return asked, ()
    if not fits:
        told = [" and ".join(what for what, kind in says.items() if kind == one) for one in TEXT_KINDS]
        raise CheckpointError(
            f"{path}: contradicts itself: {told[0] or 'nothing'} speaks for Stable Diffusion 1, "
            f"{told[1] or 'nothing'} for 2: --family decides ({', '.join(family.name for family in takes)})"
        )
    if len(fits) == 1:
        return fits[0].name, ()
    by_prediction = {kind: family.name for family in reversed(fits) for kind in family.prediction_types}
    prediction = beside.get("scheduler", {}).get("prediction_type", marks.prediction)
    if prediction is not None:
        return by_prediction.get(prediction, by_prediction["epsilon"]), ()
    if base is not None and base.family in by_prediction.values():
        return base.family, ()
    if scalars.get("global_step") == BASE_GLOBAL_STEP:
        return by_prediction["epsilon"], ()
    v, noise = by_prediction["v_prediction"], by_prediction["epsilon"]
    likely, other = (v, noise) if predicts_v(unet) else (noise, v)
    note = (
        f"{path.name} does not say whether it predicts v (768 pixels) or the noise (512 pixels): judged by its "
        f"weights to be {likely}; --family {other} chooses the other"
    )
    return likely, (note,)


def _text_encoder(parts: Mapping[str, ldm_shapes.Tensors], marks: ldm_marks.Marks) -> tuple[dict[str, str], bool]:
    """What says of which kind the text encoder is -> the kind; and whether that is certain. Names say little:
    OpenCLIP's is also written with those of CLIP's."""
    says: dict[str, str] = {}
    matrices = {name: value for name, value in parts["unet"].items() if value.ndim == 2}
    context = next((value.shape[1] for name, value in matrices.items() if name.endswith("attn2.to_k.weight")), 0)
    if context in TEXT_WIDTHS:
        says[f"a UNet that attends to states of width {context}"] = TEXT_WIDTHS[context]
    embedding = parts.get("clip", {}).get("text_model.embeddings.token_embedding.weight")
    width = embedding.shape[-1] if embedding is not None and embedding.ndim else 0
    if width in TEXT_WIDTHS:
        says[f"a text encoder of width {width}"] = TEXT_WIDTHS[width]
    if "open_clip" in parts:
        says["a text encoder with OpenCLIP's names"] = "open_clip"
    if marks.v2 is not None:
        says[f"metadata that say {'2' if marks.v2 else '1'}"] = "open_clip" if marks.v2 else "clip"
    if says:
        return says, True
    linear = any(name.endswith("1.proj_in.weight") for name in matrices)
    what = f"a UNet whose projections are {'linear' if linear else 'convolutions'}"
    return {what: "open_clip" if linear else "clip"}, False


def predicts_v(unet: ldm_shapes.Tensors) -> bool:
    """Whether SD 2 weights are of a model that predicts v: those have learnt a wide bias before the last attention,
    as ComfyUI judges them, too. Where the UNet is another than SD 2's, v is assumed."""
    bias = unet.get(TELLING_BIAS)
    return bias is None or float(bias.float().std(correction=0)) > MIN_V_SPREAD


def _tokenizer(path: Path, settings: str, vocabulary_size: int) -> dict[str, Path]:
    """Files by name: those beside the checkpoint, else CLIP's vocabulary with the family's settings."""
    for folder in (path.parent / "tokenizer", path.parent):
        there = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
        if "tokenizer.json" in there or there.keys() >= set(VOCABULARY_FILES):
            return _files(ldm_configs.FOLDER / "clip" / settings) | there
    if vocabulary_size < CLIP_VOCABULARY_SIZE:
        raise CheckpointError(
            f"{path}: its text encoder knows {vocabulary_size} tokens, CLIP's tokenizer {CLIP_VOCABULARY_SIZE}: "
            "put its vocab.json and merges.txt beside it, or into a folder `tokenizer` there"
        )
    clip = ldm_configs.FOLDER / "clip"
    return {"vocab.json": clip / "vocab.json", "merges.txt": clip / "merges.txt"} | _files(clip / settings)


def _files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir())}
