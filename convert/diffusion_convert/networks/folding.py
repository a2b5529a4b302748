"""What is put into the networks because apps have it fixed (`diffusion_runtime.folding`).

Tables are multiplied and summed rather than multiplied as matrices, so that nothing takes them for weights, which
may be palettized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Affine(nn.Module):
    """(batch, channels, height, width) -> the same, each channel times its gain plus its offset."""

    gain: torch.Tensor
    offset: torch.Tensor

    def __init__(self, gain: Sequence[float], offset: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("gain", gain), ("offset", offset)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x * self.gain + self.offset
        return result


class Padding(nn.Module):
    """input_ids (1, length) that apps have filled up with the number ``end`` -> filled up with ``padding``: of the
    run of ends at the end, all but the first are replaced. What is padded rightly is left as it is, whatever ends
    stand in the prompt itself. Must be computed in float32: float16 has no room for the numbers."""

    from_one_before: torch.Tensor

    def __init__(self, end: int, padding: int, length: int) -> None:
        super().__init__()
        self.end, self.padding = float(end), float(padding)
        place = torch.arange(length)
        from_one_before = (place[None] >= place[:, None] - 1).float()[None]
        self.register_buffer("from_one_before", from_one_before, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        words = 1.0 - (input_ids == self.end).float()
        stays = (
            (words[:, None] * self.from_one_before).sum(2).clamp(max=1.0)
        )  # 0 where only ends are from one token before on
        result: torch.Tensor = self.padding + (input_ids - self.padding) * stays
        return result


class Epsilon(nn.Module):
    """v predicted at a timestep -> the noise in ``sample`` x: ``alpha v + sigma x`` (Salimans and Ho 2022, appendix
    D).

    That holds for what schedulers hand to a UNet, which all have of unit variance: ``x = alpha picture + sigma
    noise``. Between whole timesteps alpha and sigma are interpolated. Must be computed in float32."""

    table: torch.Tensor
    steps: torch.Tensor

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        super().__init__()
        alphas = alphas_cumprod.double()
        table = torch.stack([alphas.sqrt(), (1 - alphas).sqrt()]).float()
        self.register_buffer("table", table[None], persistent=False)
        self.register_buffer("steps", torch.arange(len(alphas)).float()[None], persistent=False)

    def forward(self, v: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        inside = timestep.clamp(0.0, float(self.steps.shape[1] - 1))
        nearness = torch.relu(1.0 - (inside.reshape(-1, 1) - self.steps).abs())
        found = (nearness[:, None] * self.table).sum(2).reshape(-1, 2, 1, 1)
        noise: torch.Tensor = found[:, :1] * v + found[:, 1:] * sample[:, : v.shape[1]]
        return noise
