"""Where weights come from. Every kind of source becomes one `Checkpoint`; a VAE or a LoRA makes another of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, DiffusionError, InputError

if TYPE_CHECKING:
    import torch

    from diffusion_convert.options import Lora


@dataclass(frozen=True, slots=True)
class Submodel:
    """One network: diffusers' or transformers' configuration and its weights by diffusers' names.

    ``tensors`` maps the weights lazily, in the file's own element type: calling it reads no data.
    ``class_name`` is the class named in model_index.json ("UNet2DConditionModel", "CLIPTextModel", …).
    """

    class_name: str
    config: Mapping[str, Any]
    tensors: Callable[[], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Stable Diffusion checkpoint, whatever it was stored as.

    ``models`` and ``schedulers`` are by diffusers' subfolder ("unet", "vae", "text_encoder", "safety_checker",
    "depth_estimator"; "scheduler", "low_res_scheduler"); ``tokenizer`` maps vocab.json, merges.txt,
    tokenizer_config.json, … to where they are. ``family`` is a name in `families.FAMILIES`. ``notes`` are sentences
    for the user: what the source does not say and was assumed.
    """

    name: str
    family: str
    source: Source
    models: Mapping[str, Submodel]
    schedulers: Mapping[str, Mapping[str, Any]]
    tokenizer: Mapping[str, Path]
    pipeline_class: str = "StableDiffusionPipeline"
    pipeline_config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    family: str | None = None,
    vae: str | None = None,
    loras: Sequence[Lora] = (),
) -> Checkpoint:
    """The checkpoint that ``source`` names: a folder in diffusers' layout, a single .safetensors or .ckpt file, or
    the id of a repository on the Hugging Face Hub, with another VAE and LoRAs put in.

    No weight is read. Raises CheckpointError or InputError, in one line, for what cannot be used.
    """
    from diffusion_convert.checkpoint import diffusers_folder, lora, single_file
    from diffusion_convert.checkpoint import repository as hub
    from diffusion_convert.checkpoint import vae as vaes

    path = Path(source).expanduser()
    if revision is not None and path.exists():
        raise InputError(f"--revision {revision}: {source} is on this machine, where there is but one")
    if path.is_dir():
        origin = Source(name=path.resolve().name, licence=diffusers_folder.read_licence(path))
        checkpoint = diffusers_folder.open_folder(path, origin, family)
    elif path.is_file():
        checkpoint = single_file.open_single_file(path, family, without_vae=vae is not None)
    elif is_repository_id(source):
        checkpoint = hub.open_repository(source, revision, family)
    else:
        raise CheckpointError(f"{source}: no such file or folder")
    if vae is not None:
        with _given_as("--vae"):
            checkpoint = vaes.with_vae(checkpoint, vae, hub.fetch_vae if is_repository_id(vae) else None)
    with _given_as("--lora"):
        return lora.fuse(checkpoint, loras) if loras else checkpoint


@contextmanager
def _given_as(option: str) -> Iterator[None]:
    """Errors name the option by which the file was given."""
    try:
        yield
    except DiffusionError as error:
        if str(error).startswith(option):
            raise
        raise type(error)(f"{option} {error}") from error


def is_repository_id(source: str) -> bool:
    """Whether ``source`` is of the form owner/name, and nothing about it says that a path is meant."""
    owner, slash, name = source.partition("/")
    plain = all(part and part[0] not in ".~" and "/" not in part for part in (owner, name))
    return bool(slash) and plain and not name.endswith((".safetensors", ".ckpt", ".bin", ".pt"))
