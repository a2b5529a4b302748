"""Textual inversions, put into a checkpoint: new rows of each text encoder's token table, new tokens of its
tokenizer. Which vectors are whose follows from a file's keys; what prompts call them, from the option, else the
file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from diffusion_convert.checkpoint import tensor_file
from diffusion_convert.checkpoint.computed import FLOAT16_MAX, Computed, least_float16
from diffusion_convert.checkpoint.family import text_length
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.vocabulary import numbers_of
from diffusion_convert.option_values import Embedding
from diffusion_runtime.bundle.manifest import AddedEmbedding
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import TEXT_ENCODERS

NAMES_IN_FOLDERS = ("learned_embeds.safetensors", "learned_embeds.bin")
"""What diffusers looks for in a folder."""
OF_ENCODER: Mapping[str, str] = {
    "clip_l": TEXT_ENCODERS[0],
    "clip_g": TEXT_ENCODERS[1],
    "text_encoders_0": TEXT_ENCODERS[0],
    "text_encoders_1": TEXT_ENCODERS[1],
}
"""Keys of files for two encoders, as web interfaces and diffusers' trainers write them."""
UNNAMED = {"*", "emb_params", *OF_ENCODER}
"""Keys that are no names: the file's own name, or a name that it gives beside them, is the token then."""
TABLE = "embeddings.token_embedding.weight"


@dataclass(frozen=True, slots=True)
class _Read:
    """``vectors`` (count, width) by text encoder, of one ``token``."""

    path: Path
    token: str
    vectors: Mapping[str, torch.Tensor]

    @property
    def count(self) -> int:
        return len(next(iter(self.vectors.values())))

    @property
    def tokens(self) -> tuple[str, ...]:
        """As diffusers numbers the vectors: ``<tok>``, ``<tok>_1``, …"""
        return (self.token, *(f"{self.token}_{number}" for number in range(1, self.count)))


def with_embeddings(checkpoint: Checkpoint, embeddings: Sequence[Embedding]) -> Checkpoint:
    """The checkpoint with textual inversions in its text encoders and tokenizers, one after another. Raises
    InputError for one of another model, a token that is known already and what is no textual inversion,
    CheckpointError for a damaged file."""
    encoders = [name for name in TEXT_ENCODERS if name in checkpoint.models]
    if not encoders:
        raise InputError(f"--embedding: {checkpoint.name} has no text encoder")
    found = [_read(checkpoint, one, encoders) for one in embeddings]
    tokens = [token for one in found for token in one.tokens]
    if twice := [token for index, token in enumerate(tokens) if token in tokens[:index]]:
        raise InputError(
            f"--embedding: the token {twice[0]!r} is given twice: name another, --embedding FILE:TOKEN"
        )
    models = dict(checkpoint.models)
    for encoder in encoders:
        numbers = numbers_of(checkpoint.tokenizers[encoder], tokens)
        models[encoder] = _extended(checkpoint, encoder, found, numbers)
    records = (AddedEmbedding(name=one.path.name, token=one.token, vectors=one.count) for one in found)
    source = checkpoint.source.model_copy(update={"embeddings": (*checkpoint.source.embeddings, *records)})
    return replace(checkpoint, models=models, source=source, added_tokens=tuple(tokens))


def _extended(checkpoint: Checkpoint, encoder: str, found: Sequence[_Read], numbers: Sequence[int]) -> Submodel:
    model = checkpoint.models[encoder]
    size = int(model.config["vocab_size"])
    if numbers[0] > size:
        raise InputError(
            f"--embedding: the tokenizer of {checkpoint.name} knows {numbers[0]} tokens, the table of its "
            f"{encoder} has {size} rows: what is between them has no vectors, so that nothing can be put after them"
        )
    rows = torch.cat([one.vectors[encoder].float() for one in found])
    return replace(
        model,
        config={**model.config, "vocab_size": max(size, numbers[-1] + 1)},
        tensors=partial(_tensors, model, rows, tuple(numbers)),
        files=(*model.files, *(one.path for one in found)),
    )


def _tensors(model: Submodel, rows: torch.Tensor, numbers: tuple[int, ...]) -> Mapping[str, torch.Tensor]:
    tensors = model.tensors()
    name = next(name for name in tensors if name.endswith(TABLE))
    return Computed(tensors, {name: partial(_with_rows, rows=rows, numbers=numbers)})


def _with_rows(table: torch.Tensor, rows: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
    """``table`` with ``rows`` at ``numbers``, in its own type, but float16 where that is coarser."""
    kind = least_float16(table)
    grown = torch.zeros(max(len(table), numbers[-1] + 1), table.shape[1], dtype=kind)
    grown[: len(table)] = table
    grown[list(numbers)] = rows.to(kind)
    return grown


def _read(checkpoint: Checkpoint, embedding: Embedding, encoders: Sequence[str]) -> _Read:
    path = _file(embedding.path)
    file = tensor_file.read(path)
    vectors = _vectors(path, file.tensors, encoders)
    key = next(iter(file.tensors))
    own = file.scalars.get("name") if key in UNNAMED else key
    token = embedding.token or (own if isinstance(own, str) else "") or path.stem
    _check(checkpoint, path, vectors)
    if token != token.strip() or not token:
        raise InputError(f"--embedding {path}: the token {token!r} begins or ends with a space, or is empty")
    return _Read(path, token, vectors)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    there = [path / name for name in NAMES_IN_FOLDERS if (path / name).is_file()]
    if not there:
        raise InputError(f"--embedding {path}: has no {' and no '.join(NAMES_IN_FOLDERS)}: name the file")
    return there[0]


def _vectors(path: Path, tensors: Mapping[str, torch.Tensor], encoders: Sequence[str]) -> dict[str, torch.Tensor]:
    """(count, width) by encoder."""
    if len(tensors) == 1 and len(encoders) == 1:
        (vectors,) = tensors.values()
        return {encoders[0]: vectors.reshape(1, -1) if vectors.ndim == 1 else vectors}
    found = {OF_ENCODER[name]: vectors for name, vectors in tensors.items() if name in OF_ENCODER}
    if len(found) != len(tensors):
        shown = ", ".join(sorted(tensors)[:3])
        what = "is for one text encoder" if len(tensors) == 1 else f"holds {len(tensors)} tensors ({shown} …)"
        raise InputError(
            f"--embedding {path}: {what}: expected "
            + ("one tensor of vectors" if len(encoders) == 1 else "clip_l and clip_g, of Stable Diffusion XL")
        )
    if missing := [name for name in encoders if name not in found]:
        raise InputError(f"--embedding {path}: has no vectors for the {missing[0]}: not of this model")
    if len(encoders) == 1 and encoders[0] == TEXT_ENCODERS[0]:
        raise InputError(
            f"--embedding {path}: is of Stable Diffusion XL, with two text encoders: not of this model"
        )
    return {name: found[name].reshape(1, -1) if found[name].ndim == 1 else found[name] for name in encoders}


def _check(checkpoint: Checkpoint, path: Path, vectors: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError for vectors of another model, or that are none."""
    for problem in _problems(checkpoint, vectors):
        raise InputError(f"--embedding {path}: {problem}")


def _problems(checkpoint: Checkpoint, vectors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    room = text_length(checkpoint) - 2
    for encoder, values in vectors.items():
        width = int(checkpoint.models[encoder].config["hidden_size"])
        if values.ndim != 2 or not values.is_floating_point() or not len(values):
            yield f"a tensor of shape {tuple(values.shape)}: expected (vectors, {width}) numbers"
        elif values.shape[1] != width:
            yield (
                f"vectors of {values.shape[1]} numbers, but the {encoder} of {checkpoint.name} "
                f"({checkpoint.family}) takes {width}: not of this model"
            )
        elif len(values) > room:
            yield f"{len(values)} vectors, but a prompt has room for {room}"
        elif not bool(values.float().isfinite().all()) or float(values.float().abs().max()) > FLOAT16_MAX:
            yield "holds values that are not finite, or too large for float16: the file is damaged"
    counts = {len(values) for values in vectors.values() if values.ndim == 2}
    if len(counts) > 1:
        yield f"has {' and '.join(map(str, sorted(counts)))} vectors for the two encoders: expected as many of each"
