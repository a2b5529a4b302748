"""Stable Diffusion checkpoints to Core ML packages, on any machine.

from diffusion_convert import ConvertOptions, convert

convert("stable-diffusion-v1-5/stable-diffusion-v1-5", "models", ConvertOptions(nbits=6))
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_convert.options import ConvertOptions, Lora, Precision
from diffusion_runtime.families import AttentionKind

if TYPE_CHECKING:
    from diffusion_convert.conversion.convert import Conversion
    from diffusion_convert.conversion.events import Progress

__all__ = ["AttentionKind", "ConvertOptions", "Lora", "Precision", "convert"]


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the checkpoint ``source``, a folder, a file or a Hub id, to Core ML models in the folder ``output``.

    Every model is verified against the checkpoint's own network before it appears; the result appears whole or not
    at all. It is added to what was made there of the same source with the same options, and takes the place of
    anything else that a conversion made there. A conversion that was stopped goes on where it stopped.
    ``progress`` is told of everything that is done.

    Raises InputError (options and paths that cannot be used), CheckpointError (a source that is missing, damaged or
    of an unknown kind), UnsupportedError (a network that is not covered), VerificationError (a model that does not
    compute what its source computes): messages of one line.
    """
    from diffusion_convert.conversion import convert as conversion

    return conversion.convert(str(source), Path(output), options or ConvertOptions(), progress or (lambda _: None))
