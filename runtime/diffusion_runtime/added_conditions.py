"""What SDXL's UNets are told of a picture's size: time_ids (Podell et al., SDXL, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion_runtime.errors import InputError
from diffusion_runtime.numbers import is_number, is_whole

Size = tuple[int, int]
MAX_SIDE = 1 << 16
WITH_TARGET, WITH_SCORE = 6, 5
"""How many time_ids there are: of the base, which ends in the target's size, and of the refiner, in a score."""


@dataclass(frozen=True, slots=True)
class SizeConditioning:
    """Sizes are (height, width) in pixels, None: the picture's own; a crop is (top, left). Names and defaults are
    those of diffusers' pipelines. Raises InputError for what is no size or score."""

    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name.endswith("score"):
                if not is_number(value):
                    raise InputError(f"{name} {value!r}: expected a number, usually 0 to 10")
            elif value is not None and not _is_size(value):
                raise InputError(f"{name} {value!r}: expected two whole numbers of pixels, as in (1024, 1024)")

    def time_ids(self, size: Size, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(count,) float32 of the prompt and of the negative prompt, for a picture of ``size``."""
        ids = [*(self.original_size or size), *self.crops_coords_top_left]
        negative = [*ids]
        if self.negative_original_size is not None:
            negative = [*self.negative_original_size, *self.negative_crops_coords_top_left]
        target = self.target_size or size
        endings = {
            WITH_TARGET: (target, self.negative_target_size or target),
            WITH_SCORE: ((self.aesthetic_score,), (self.negative_aesthetic_score,)),
        }
        if count not in endings:
            raise InputError(
                f"unet: takes {count} time_ids, expected {WITH_TARGET} (SDXL) or {WITH_SCORE} (refiner)"
            )
        ending, negative_ending = endings[count]
        return torch.tensor([*ids, *ending]).float(), torch.tensor([*negative, *negative_ending]).float()


def _is_size(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(is_whole(one) and 0 <= one <= MAX_SIDE for one in value)
    )
