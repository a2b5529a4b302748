"""A UNet in a folder or repository of its own, as distilled and fine-tuned ones are published: config.json beside
weights under diffusers' names. Another checkpoint gives the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffusion_convert.checkpoint import diffusers_folder
from diffusion_convert.checkpoint.diffusers_unet import CLASS_NAME
from diffusion_convert.checkpoint.family import of_unet
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import InputError


def open_unet(
    folder: Path, source: Source, base: Checkpoint, family: str | None = None, variant: str | None = None
) -> Checkpoint:
    """``base`` with the UNet in ``folder``. No weight is read. Raises InputError for a folder with a whole
    checkpoint and for a variant that is not there, CheckpointError for one without a UNet that is covered."""
    if (folder / diffusers_folder.INDEX).is_file():
        where = folder if source.revision is None else source.name
        raise InputError(
            f"--base {base.source.name}: {where} is no single file and no UNet alone, and lacks nothing"
        )
    unet = diffusers_folder.read_submodel(folder, CLASS_NAME, variant)
    if unet.config.get("_class_name", CLASS_NAME) != CLASS_NAME:
        raise InputError(
            f"{folder}: its config.json is of class {unet.config['_class_name']}: expected {CLASS_NAME}"
        )
    diffusers_folder.check_variant(folder, {".": unet}, variant)
    found = of_unet(unet.config, base.schedulers["scheduler"], family, str(folder), base.models)
    return replace(
        base, name=source.name, family=found, source=source, models={**base.models, "unet": unet}, notes=()
    )
