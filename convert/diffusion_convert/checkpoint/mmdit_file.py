"""Stable Diffusion 3 in one file, as Stability AI publishes it: the transformer and the VAE, and in some files the
text encoders.

What no shape shows is in ``configs/sd3.json``. T5's tokenizer is in no file: without a folder ``tokenizer_3``
beside it, or a base that has one, T5 is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import ldm_configs
from diffusion_convert.checkpoint.ldm_layout import Network
from diffusion_convert.checkpoint.ldm_shapes import Tensors
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.tensor_file import below
from diffusion_convert.checkpoint.vocabulary import FAST, SENTENCEPIECE, T5_FILES
from diffusion_runtime.bundle.integrity import sha256
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import COMPONENTS, FAMILIES, T5
from diffusion_runtime.real_path import is_there

FAMILY, MARK = "sd3", "joint_blocks.0.x_block.attn.qkv.weight"
T5_SUBFOLDER = COMPONENTS[T5].subfolder
PREFIXES = ("model.diffusion_model.", "")
NETWORKS = (
    Network("mmdit", PREFIXES, "transformer", "SD3Transformer2DModel"),
    Network("vae", ("first_stage_model.", "vae."), "vae", "AutoencoderKL"),
    Network("clip_l", ("text_encoders.clip_l.transformer.",), "text_encoder", "CLIPTextModelWithProjection"),
    Network("clip_2", ("text_encoders.clip_g.transformer.",), "text_encoder_2", "CLIPTextModelWithProjection"),
    Network("t5", ("text_encoders.t5xxl.transformer.",), T5_SUBFOLDER, "T5EncoderModel"),
)
NEEDED = ("vae", "text_encoder", "text_encoder_2")


def is_one(tensors: Tensors) -> bool:
    return any(f"{prefix}{MARK}" in tensors for prefix in PREFIXES)


def part(tensors: Tensors, network: Network) -> dict[str, torch.Tensor]:
    """What of a file is of the network, by the names inside it; nothing where it is not there."""
    of_others = tuple(prefix for other in NETWORKS for prefix in other.prefixes if prefix)
    for prefix in network.prefixes:
        found = below(tensors, prefix)
        if not prefix:
            found = {name: value for name, value in found.items() if not name.startswith(of_others)}
        if found:
            return found
    return {}


Read = Callable[[Path, Network, "Tensors", Mapping[str, Any], ldm_configs.Sections], Submodel]
ReadTokenizer = Callable[[Path, str, str, int], Mapping[str, Path]]


def open_file(
    path: Path,
    tensors: Tensors,
    family: str | None,
    without_vae: bool,
    base: Checkpoint | None,
    *,
    submodel: Read,
    clip_tokenizer: ReadTokenizer,
) -> Checkpoint:
    """The checkpoint in a file with ``tensors``. See `single_file.open_single_file`, whose way of reading a network
    and a tokenizer is given."""
    if family not in (None, FAMILY):
        raise InputError(f"{path}: family {family!r} does not fit a Stable Diffusion 3 model: expected {FAMILY}")
    if base is not None and base.family != FAMILY:
        raise InputError(f"--base {base.source.name}: is {base.family}, but {path} is {FAMILY}")
    data, beside = ldm_configs.family_data(FAMILY), ldm_configs.read_beside(path)
    models = dict(base.models) if base is not None else {}
    for network in NETWORKS:
        if own := part(tensors, network):
            models[network.subfolder] = submodel(path, network, own, data, beside)
    needed = NEEDED[int(without_vae) :]
    if missing := [name for name in needed if name not in models]:
        raise CheckpointError(f"{path}: has no {' and no '.join(missing)}: give what is missing with --base")
    tokenizers = {**(base.tokenizers if base is not None else {}), **_t5_tokenizer(path)}
    if T5_SUBFOLDER not in tokenizers:
        models.pop(T5_SUBFOLDER, None)
    for name, encoder in zip(("tokenizer", "tokenizer_2"), FAMILIES[FAMILY].encoders, strict=True):
        if base is None:
            size = int(models[encoder].config["vocab_size"])
            tokenizers[encoder] = clip_tokenizer(path, name, data[name], size)
    scheduler = data["scheduler"] if base is None else base.schedulers["scheduler"]
    return Checkpoint(
        name=path.stem,
        family=FAMILY,
        source=Source(name=path.name, sha256=sha256(path)),
        models=models,
        schedulers={"scheduler": ldm_configs.merge(scheduler, beside.get("scheduler", {}))},
        tokenizers=tokenizers,
        notes=tuple(_notes(path, tensors, tokenizers)),
    )


def _t5_tokenizer(path: Path) -> dict[str, Mapping[str, Path]]:
    folder = path.parent / "tokenizer_3"
    there = {name: folder / name for name in T5_FILES if is_there(folder / name, CheckpointError)}
    return {T5_SUBFOLDER: there} if there.keys() & {FAST, SENTENCEPIECE} else {}


def _notes(path: Path, tensors: Tensors, tokenizers: Collection[str]) -> Iterator[str]:
    if part(tensors, NETWORKS[-1]) and T5_SUBFOLDER not in tokenizers:
        yield (
            f"{path.name} has T5 without its tokenizer: made without T5; a folder tokenizer_3 beside the file, or "
            "--base, gives it"
        )
