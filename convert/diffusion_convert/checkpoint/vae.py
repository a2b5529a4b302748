"""Another VAE in place of the checkpoint's own, for encoder and decoder alike, with its latent scale and shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint import (
    config_models,
    diffusers_folder,
    ldm_configs,
    ldm_names,
    ldm_shapes,
    repository,
    tensor_file,
    tiny_vae,
    torch_networks,
)
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES

if TYPE_CHECKING:
    import torch

CLASS_NAME = "AutoencoderKL"
CLASSES = (CLASS_NAME, tiny_vae.CLASS_NAME)
PREFIXES = ("first_stage_model.", "vae.", "")
"""Where a VAE lies in a file in LDM's layout: within a checkpoint, or alone."""

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_DIFFUSERS_MARKS = ("decoder.up_blocks.", "decoder.layers.")


PREVIEW = "preview_vae"
"""The subfolder of a VAE that previews alone are decoded with."""


def gives_latents(class_name: str) -> bool:
    """Whether the encoder of a VAE of that class gives latents, and no distribution to draw them from."""
    return class_name == tiny_vae.CLASS_NAME


def with_vae(checkpoint: Checkpoint, source: str, subfolder: str = "vae") -> Checkpoint:
    """The checkpoint with the VAE of ``source``: the folder of an AutoencoderKL or AutoencoderTiny (TAESD), a
    pipeline's folder, a file in LDM's layout (a VAE alone or a whole checkpoint), half of a TAESD, or a Hub id.
    ``subfolder``: in whose place, "vae" or `PREVIEW`.

    Raises InputError for a VAE that does not fit the checkpoint's latents and pictures, CheckpointError for one
    that is damaged or of another class.
    """
    path = Path(source).expanduser()
    if path.is_file():
        vae = _from_file(path, checkpoint.family)
    else:
        vae = _from_folder(repository.network_folder(source, "vae")[0])
    torch_networks.check(vae, vae.tensors(), f"{source}: vae")
    _check_fits(f"{_option(subfolder)} {source}", vae.config, checkpoint)
    return replace(checkpoint, models={**checkpoint.models, subfolder: vae})


def _option(subfolder: str) -> str:
    return f"--{subfolder.replace('_', '-')}"


def _from_folder(folder: Path) -> Submodel:
    kind = diffusers_folder.read_json(folder / "config.json").get("_class_name")
    if kind not in CLASSES:
        raise CheckpointError(f"{folder}: its config.json is of class {kind}: expected {' or '.join(CLASSES)}")
    return diffusers_folder.read_submodel(folder, str(kind))


def _from_file(path: Path, family: str) -> Submodel:
    """A file says nothing of the latents' scale: it is that of the family, whose latents it is for."""
    tensors = tensor_file.read(path).tensors
    if tiny_vae.is_half(tensors):
        return tiny_vae.from_halves(path)
    if any(name.startswith(_DIFFUSERS_MARKS) for name in tensors):
        if not (path.parent / "config.json").is_file():
            raise CheckpointError(
                f"{path}: in diffusers' layout, but without the config.json that belongs next to it"
            )
        return replace(_from_folder(path.parent), tensors=partial(_read_all, path), files=(path,))
    try:
        data, beside = ldm_configs.family_data(family), ldm_configs.read_beside(path)
        config = ldm_configs.config("vae", "vae", _part(tensors), data, beside)
        config = config_models.checked(CLASS_NAME, config, "vae")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no VAE in LDM's layout: {error}") from error
    return Submodel(CLASS_NAME, config, partial(_map_tensors, path, config), (path,))


def _read_all(path: Path) -> Mapping[str, torch.Tensor]:
    return tensor_file.read(path).tensors


def _map_tensors(path: Path, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    return ldm_names.vae(_part(tensor_file.read(path).tensors), config)


def _part(tensors: ldm_shapes.Tensors) -> dict[str, torch.Tensor]:
    """The VAE's own tensors, without what it was trained with (``loss.…``, averages)."""
    prefix = next(prefix for prefix in PREFIXES if not prefix or any(name.startswith(prefix) for name in tensors))
    own = tensor_file.below(tensors, prefix)
    return {name: value for name, value in own.items() if name.startswith(_PARTS)}


def _check_fits(source: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    own, new = _expected(checkpoint), _interface(config)
    wrong = [f"{what} {new[what]}, expected {own[what]}" for what in own if new[what] != own[what]]
    if wrong:
        raise InputError(f"{source}: does not fit this {checkpoint.family} checkpoint: {'; '.join(wrong)}")


def _expected(checkpoint: Checkpoint) -> dict[str, int]:
    """`_interface` of the checkpoint's own VAE; for a file that came without one, of its family's."""
    if "vae" in checkpoint.models:
        return _interface(checkpoint.models["vae"].config)
    return {
        **_interface({"latent_channels": checkpoint.denoiser.config["out_channels"]}),
        "pixels per latent": FAMILIES[checkpoint.family].latent_factor,
    }


def _interface(config: Mapping[str, Any]) -> dict[str, int]:
    """What a VAE has to share with the one that it replaces."""
    return {
        "latent channels": int(config.get("latent_channels", 4)),
        "picture channels": int(config.get("in_channels", 3)),
        "decoded channels": int(config.get("out_channels", 3)),
        "pixels per latent": latent_factor(config),
    }
