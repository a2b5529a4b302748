"""From latents to pictures: decoded, and checked."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_runtime import images
from diffusion_runtime.bundle.manifest import Latents
from diffusion_runtime.models import Models, unfit_latents
from diffusion_runtime.safety import is_flagged

DECODER, OF_PREVIEWS = "vae_decoder", "preview_vae_decoder"
"""The components that decode latents: pictures, and previews where there is one for those alone."""


def decode(models: Models, scaling: Latents, latents: torch.Tensor, component: str = DECODER) -> torch.Tensor:
    """Latents (n, channels, height, width) to pictures (n, 3, height, width) in about -1..1. Raises InputError for
    latents that the decoder's type of numbers cannot hold."""
    decoder = models[component]
    (name, spec), *_ = decoder.inputs.items()
    with np.errstate(over="ignore"):  # of float16: it becomes infinity
        scaled = (latents / scaling.scale + scaling.shift).numpy().astype(spec.dtype)
    if not np.isfinite(scaled).all():
        raise unfit_latents()
    pictures = [decoder.one("image", **{name: scaled[i : i + 1]}) for i in range(len(scaled))]
    return torch.from_numpy(np.concatenate(pictures)).float()


def checked(models: Models, decoded: torch.Tensor, check_safety: bool) -> tuple[np.ndarray, list[bool] | None]:
    """Pictures (n, height, width, 3) in 0..1, flagged ones black, and the flags; None where nothing checks."""
    arrays = images.to_arrays(decoded)
    models.release(DECODER, OF_PREVIEWS)
    if not check_safety or "safety_checker" not in models:
        return arrays, None
    flags = [is_flagged(models["safety_checker"], picture) for picture in arrays]
    arrays[np.array(flags)] = 0.0
    models.release("safety_checker")
    return arrays, flags
