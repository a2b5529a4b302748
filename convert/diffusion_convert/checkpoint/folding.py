"""What apps have fixed, put into the models: which of it a checkpoint needs, and its own values.

`fold` only notes it in the checkpoint (`Checkpoint.folded`); the components put it into their networks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError

from diffusion_convert.checkpoint.family import latent_scale
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.vocabulary import write_vocabulary
from diffusion_runtime import schedulers
from diffusion_runtime.bundle.manifest import Folded, OwnLatents
from diffusion_runtime.errors import CheckpointError, DiffusionError
from diffusion_runtime.families import FAMILIES, TEXT_ENCODERS
from diffusion_runtime.folding import Folding
from diffusion_runtime.prompt import tokenizer as tokenizers
from diffusion_runtime.scratch import scratch


def fold(checkpoint: Checkpoint, foldings: Collection[Folding]) -> Checkpoint:
    """The checkpoint with those of the ``foldings`` that it needs, and its padding. Raises CheckpointError for a
    tokenizer or a scheduler's configuration that cannot be read."""
    padding = _padding(checkpoint)
    folded = Folded(
        latents=_latents(checkpoint, Folding.LATENT_SCALE in foldings),
        padding=(padding or None) if Folding.PADDING in foldings else None,
        prediction_type="v_prediction"
        if Folding.PREDICTION in foldings
        and own_prediction(checkpoint) == "v_prediction"
        and schedulers.has_signal(checkpoint.schedulers["scheduler"], checkpoint.family)
        else None,
    )
    return replace(checkpoint, folded=folded, padding=padding)


def own_prediction(checkpoint: Checkpoint) -> str:
    scheduler = checkpoint.schedulers["scheduler"]
    usual = schedulers.FLOW if schedulers.is_flow_match(scheduler) else "epsilon"
    return str(scheduler.get("prediction_type", usual))


def prediction(checkpoint: Checkpoint) -> str:
    """What the converted UNet predicts."""
    return own_prediction(checkpoint) if checkpoint.folded.prediction_type is None else "epsilon"


def latents(checkpoint: Checkpoint) -> tuple[float, float]:
    """Scale and shift of the converted VAE's latents."""
    if checkpoint.folded.latents is not None:
        family = FAMILIES[checkpoint.family]
        return family.latent_scale, family.latent_shift
    own = own_latents(checkpoint)
    return own.scale, own.shift


def end_token(checkpoint: Checkpoint, encoder: str) -> int:
    return _ends(checkpoint, encoder)[0]


def alphas_cumprod(checkpoint: Checkpoint) -> torch.Tensor:
    """The checkpoint's schedule, as diffusers computes it: float32 (training steps,)."""
    return schedulers.alphas_cumprod(checkpoint.schedulers["scheduler"], checkpoint.family)


def own_latents(checkpoint: Checkpoint, subfolder: str = "vae") -> OwnLatents:
    """What a VAE's configuration says of its latents."""
    config = checkpoint.models[subfolder].config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None or not FAMILIES[checkpoint.family].added_conditions:
        try:
            return OwnLatents(scale=latent_scale(config), shift=float(config.get("shift_factor") or 0.0))
        except ValidationError as error:
            reason = error.errors()[0]
            raise CheckpointError(f"{checkpoint.name}: the VAE's {reason['loc'][0]}: {reason['msg']}") from error
    channels = int(config["latent_channels"])
    if (len(mean), len(std)) != (channels, channels):
        raise CheckpointError(
            f"{checkpoint.name}: the VAE's latents_mean and latents_std have {len(mean)} and {len(std)} numbers: "
            f"expected one for each of {channels} channels"
        )
    return OwnLatents(scale=latent_scale(config), mean=tuple(mean), std=tuple(std))


def _latents(checkpoint: Checkpoint, wanted: bool) -> OwnLatents | None:
    """The VAE's own, where they are not what apps take them for. ``mean`` and ``std``, which only SDXL's pipelines
    of diffusers know, have no place in the manifest's latents: they are folded whatever is ``wanted``."""
    own = own_latents(checkpoint)
    family = FAMILIES[checkpoint.family]
    same = own == OwnLatents(scale=family.latent_scale, shift=family.latent_shift)
    return None if same or not (wanted or own.std) else own


def _padding(checkpoint: Checkpoint) -> dict[str, int]:
    found = {}
    for name in TEXT_ENCODERS:
        if name in checkpoint.models:
            end, padding = _ends(checkpoint, name)
            if padding != end:
                found[name] = padding
    return found


def _ends(checkpoint: Checkpoint, encoder: str) -> tuple[int, int]:
    """The numbers of <|endoftext|> and of the padding, as the runtime reads them."""
    files, default = _tokenizer(checkpoint, encoder)
    with scratch() as folder:
        write_vocabulary(files, folder, checkpoint.added_tokens)
        try:
            clip = tokenizers.load(folder, pad_token=default)
        except DiffusionError as error:
            raise CheckpointError(f"{checkpoint.name}: {error}") from error
    return clip.number("eos_token"), clip.number("pad_token")


def _tokenizer(checkpoint: Checkpoint, encoder: str) -> tuple[Mapping[str, Path], str | None]:
    second = encoder == TEXT_ENCODERS[1] and len(checkpoint.clip_tokenizers) > 1
    return checkpoint.tokenizers[encoder], "!" if second else FAMILIES[checkpoint.family].pad_token
