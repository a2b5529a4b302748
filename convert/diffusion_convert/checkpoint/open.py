"""Opens whatever a user names as a checkpoint, and puts another VAE and LoRAs in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusion_convert.checkpoint import diffusers_folder, diffusers_unet, lora, repository, single_file, unet_alone
from diffusion_convert.checkpoint.controlnet import with_controlnets
from diffusion_convert.checkpoint.embeddings import NAMES_IN_FOLDERS, with_embeddings
from diffusion_convert.checkpoint.family import refuse_other_uses
from diffusion_convert.checkpoint.ip_adapter import ENCODER, with_ip_adapters
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_convert.checkpoint.refiner import FAMILY, with_refiner
from diffusion_convert.checkpoint.t2i_adapter import with_t2i_adapters
from diffusion_convert.checkpoint.vae import PREVIEW, with_vae
from diffusion_convert.option_values import Embedding, check_path
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import CheckpointError, DiffusionError, InputError
from diffusion_runtime.families import COMPONENTS, FAMILIES, T5, TEXT_ENCODERS, UNET
from diffusion_runtime.real_path import real_path


def open_checkpoint(source: str, options: ConvertOptions | None = None) -> Checkpoint:
    """The checkpoint that ``source`` names: a folder in diffusers' layout, a single .safetensors, .ckpt or .gguf
    file, or the id of a repository on the Hugging Face Hub, with what ``options`` put in: another VAE, LoRAs and
    so on. Of the options those are looked at that `Option.opening` marks. ``variant``: of a folder's weights, as in
    diffusers; with a single file, of those of ``base``.

    No weight is read. Raises CheckpointError or InputError, in one line, for what cannot be used.
    """
    check_path("", source)
    options = options or ConvertOptions()
    checkpoint = _open_source(source, options)
    for option, of_vae, subfolder in (
        ("--vae", options.vae, "vae"),
        ("--preview-vae", options.preview_vae, PREVIEW),
    ):
        if of_vae is not None:
            with _given_as(option):
                checkpoint = with_vae(checkpoint, of_vae, subfolder)
    checkpoint = _without_t5(checkpoint) if options.no_t5 else checkpoint
    _refuse_without_unet(checkpoint, options)
    _check_fits(checkpoint)
    refuse_other_uses(checkpoint)
    return _with_networks(checkpoint, options)


def _with_networks(checkpoint: Checkpoint, options: ConvertOptions) -> Checkpoint:
    """With what is put beside the checkpoint's own networks, or into them."""
    if options.refiner is not None:
        checkpoint = with_refiner(checkpoint, options.refiner, _open_refiner(options.refiner, checkpoint))
    if options.controlnets:
        with _given_as("--controlnet"):
            checkpoint = with_controlnets(checkpoint, options.controlnets)
    if options.loras:
        with _given_as("--lora"):
            checkpoint = lora.fuse(checkpoint, options.loras, options.lora_partial)
    if options.embeddings:
        with _given_as("--embedding"):
            checkpoint = with_embeddings(checkpoint, [_fetched(one) for one in options.embeddings])
    if options.t2i_adapters:
        checkpoint = with_t2i_adapters(checkpoint, options.t2i_adapters)
    return _with_ip_adapters(checkpoint, options)


def _open_source(source: str, options: ConvertOptions) -> Checkpoint:
    """What is named, without what users add to it."""
    revision, family, variant, base = options.revision, options.family, options.variant, options.base
    path, without = Path(source).expanduser(), diffusers_folder.T5_PARTS if options.no_t5 else ()
    if revision is not None and path.exists():
        raise InputError(f"--revision {revision}: {source} is on this machine, where there is but one")
    if path.is_file() and variant is not None and base is None:
        raise InputError(f"--variant {variant}: {source} is one file, whose weights have no variants")
    if base is not None and not path.is_file():
        return _open_unet(source, path, _open_base(base), options)
    if path.is_dir():
        origin = Source(name=real_path(path).name, license=diffusers_folder.read_license(path))
        return diffusers_folder.open_folder(path, origin, family, variant, without)
    if path.is_file():
        rest = None if base is None else _open_base(base, variant)
        return single_file.open_single_file(path, family, options.vae is not None, rest)
    return repository.open_repository(repository.repository_id(source), revision, family, variant, without)


def _refuse_without_unet(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    """Raise InputError for the first option that is for UNets alone, where the models have none."""
    family = FAMILIES[checkpoint.family]
    if family.denoiser is UNET:
        return
    for option in ("refiner", "controlnets", "embeddings", "ip_adapters", "t2i_adapters"):
        if getattr(options, option):
            flag = f"--{option.removesuffix('s').replace('_', '-')}"
            raise InputError(f"{flag}: it is for models with a UNet, and {family.title} has none: leave it out")


def _with_ip_adapters(checkpoint: Checkpoint, options: ConvertOptions) -> Checkpoint:
    """A file on the Hub is fetched with the image encoder beside it, which only the first is asked for."""
    sources, image_encoder = options.ip_adapters, options.image_encoder
    if not sources:
        return checkpoint
    folder = None
    if image_encoder is not None:
        local = Path(image_encoder).expanduser()
        folder = local if local.exists() else repository.fetch_folder(image_encoder)
    with _given_as("--ip-adapter"):
        files = [
            (source, _adapter_file(source, beside=folder is None and not index))
            for index, source in enumerate(sources)
        ]
        return with_ip_adapters(checkpoint, files, folder, options.ip_adapter_pictures)


def _adapter_file(source: str, beside: bool) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{source}: is a folder: name the adapter's file in it, as ip-adapter_sd15.safetensors")
    return path if path.exists() else repository.fetch_file(source, ENCODER if beside else None)


def _without_t5(checkpoint: Checkpoint) -> Checkpoint:
    family = FAMILIES[checkpoint.family]
    if not family.joint_text:
        raise InputError(f"--no-t5: {family.title} has no T5; it is of Stable Diffusion 3 alone")
    t5 = COMPONENTS[T5].subfolder
    models = {name: model for name, model in checkpoint.models.items() if name != t5}
    tokenizers = {name: files for name, files in checkpoint.tokenizers.items() if name != t5}
    return replace(checkpoint, models=models, tokenizers=tokenizers)


def _fetched(embedding: Embedding) -> Embedding:
    """Of a concept's repository, or a file in one, what is downloaded of it; any other as it is."""
    place = embedding.path.as_posix()
    if not embedding.path.exists() and repository.is_repository_id(place):
        return replace(embedding, path=repository.fetch_one(place, NAMES_IN_FOLDERS))
    if not embedding.path.exists() and repository.is_file_id(place):
        return replace(embedding, path=repository.fetch_file(place))
    return embedding


def _open_base(base: str, variant: str | None = None) -> Checkpoint:
    with _given_as("--base"):
        return open_checkpoint(base, ConvertOptions(variant=variant))


def _open_unet(source: str, path: Path, base: Checkpoint, options: ConvertOptions) -> Checkpoint:
    if path.is_dir():
        folder, name, revision = path, diffusers_unet.name_of(real_path(path)), None
    else:
        folder = repository.fetch_unet(repository.repository_id(source), options.revision, options.variant)
        name, revision = source, folder.name
    origin = Source(name=name, revision=revision, license=diffusers_folder.read_license(folder))
    return unet_alone.open_unet(folder, origin, base, options.family, options.variant)


def _open_refiner(source: str, checkpoint: Checkpoint) -> Checkpoint:
    """A single file may hold the UNet alone: the rest is the base's."""
    path = Path(source).expanduser()
    with _given_as("--refiner"):
        if path.is_file():
            return single_file.open_single_file(path, FAMILY, base=checkpoint)
        return open_checkpoint(source)


def _check_fits(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for networks that cannot work together, though each is whole."""
    network, vae = checkpoint.denoiser.config, checkpoint.models["vae"].config
    channels = int(network["out_channels"] or network["in_channels"])
    pairs = [("VAE has latents of", int(vae["latent_channels"]), "channels", channels)]
    text = [model for name, model in checkpoint.models.items() if name in TEXT_ENCODERS]
    if FAMILIES[checkpoint.family].joint_text:
        pairs += _joint_pairs(checkpoint, text)
    elif text:
        width = sum(int(model.config["hidden_size"]) for model in text)
        what = f"text encoder{'s give' if len(text) > 1 else ' gives'} states of"
        pairs.append((what, width, "channels", int(network["cross_attention_dim"])))
    taker = "UNet" if "unet" in checkpoint.models else "transformer"
    for what, given, unit, wanted in pairs:
        if given != wanted:
            raise CheckpointError(
                f"{checkpoint.name}: the {what} {given} {unit}, but the {taker} takes {wanted}: not of one model"
            )


def _joint_pairs(checkpoint: Checkpoint, clips: Sequence[Submodel]) -> Iterator[tuple[str, int, str, int]]:
    """What must fit where the states of CLIP's encoders are followed by T5's, filled with zeros to their width."""
    config = checkpoint.denoiser.config
    pooled, wide = int(config["pooled_projection_dim"]), int(config["joint_attention_dim"])
    given = sum(int(model.config["projection_dim"]) for model in clips)
    yield "text encoders give pooled states of", given, "channels", pooled
    t5 = checkpoint.models.get(COMPONENTS[T5].subfolder)
    if t5 is not None:
        yield "T5 encoder gives states of", int(t5.config["d_model"]), "channels", wide
    narrow = sum(int(model.config["hidden_size"]) for model in clips)
    if narrow > wide:
        yield "text encoders give states of", narrow, "channels", wide


@contextmanager
def _given_as(option: str) -> Iterator[None]:
    """Errors name the option by which the file was given."""
    try:
        yield
    except DiffusionError as error:
        if str(error).startswith(option):
            raise
        raise type(error)(f"{option} {error}") from error
