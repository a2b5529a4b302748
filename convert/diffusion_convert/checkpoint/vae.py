"""Another VAE in place of the checkpoint's own, for encoder and decoder alike, with its latent scale and shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint import (
    diffusers_folder,
    ldm_configs,
    repository,
    single_file,
    tensor_file,
    tiny_vae,
    torch_networks,
)
from diffusion_convert.checkpoint.family import latent_factor
from diffusion_convert.checkpoint.ldm_layout import NETWORKS, split
from diffusion_convert.checkpoint.model import Checkpoint, Submodel
from diffusion_runtime.errors import CheckpointError, InputError
from diffusion_runtime.families import FAMILIES

CLASSES = ("AutoencoderKL", tiny_vae.CLASS_NAME)
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
    return diffusers_folder.read_network(folder, "VAE", *CLASSES)


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
    if (part := split(tensors).get("vae")) is None:
        raise CheckpointError(f"{path}: no VAE in LDM's layout")
    network = next(network for network in NETWORKS if network.kind == "vae")
    data, beside = ldm_configs.family_data(family), ldm_configs.read_beside(path)
    return single_file.submodel(path, network, part, data, beside)


def _read_all(path: Path) -> Mapping[str, torch.Tensor]:
    return tensor_file.read(path).tensors


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
