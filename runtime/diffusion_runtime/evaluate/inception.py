"""Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) up to its 2048 features, under torchvision's names.

The weights are those of ImageNet's 1000 classes as timm publishes them. Published FIDs use others, of 2015 and 1008
classes, which are stored as a pickle only: distances compare with each other, not with those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, max_pool2d, relu

from diffusion_runtime import strict_json
from diffusion_runtime.errors import InputError

REPOSITORY = "timm/inception_v3.tf_in1k"
ARCHITECTURE = "inception_v3"
"""What timm's config.json calls it."""
SIDE = 299
EPSILON = 1e-3  # of the batch norms: TensorFlow's, not torch's default


@dataclass(frozen=True, slots=True)
class Inception:
    """``weights`` by torchvision's names; a pixel of 0..1 enters as (pixel - mean) / deviation."""

    weights: Mapping[str, Tensor]
    mean: Tensor
    deviation: Tensor

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(pictures, 2048). Pictures are resized as a whole, bicubic and antialiased (Parmar et al. 2021,
        arXiv 2104.11222)."""
        resized = [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]
        pixels = torch.from_numpy(np.stack([np.asarray(one) for one in resized])).permute(0, 3, 1, 2) / 255.0
        return self.features((pixels - self.mean) / self.deviation)

    def features(self, x: Tensor) -> Tensor:
        """Of (batch, 3, 299, 299)."""
        x = self._conv(x, "Conv2d_1a_3x3", stride=2, padded=False)
        x = self._conv(x, "Conv2d_2a_3x3", padded=False)
        x = max_pool2d(self._conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = self._conv(x, "Conv2d_3b_1x1")
        x = max_pool2d(self._conv(x, "Conv2d_4a_3x3", padded=False), 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._mixed(x, name, ("branch1x1",), ("branch5x5_1", "branch5x5_2"), _numbered("branch3x3dbl", 3))
        x = self._smaller(x, "Mixed_6a", ("branch3x3",), _numbered("branch3x3dbl", 3))
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._mixed(x, name, ("branch1x1",), _numbered("branch7x7", 3), _numbered("branch7x7dbl", 5))
        x = self._smaller(x, "Mixed_7a", _numbered("branch3x3", 2), _numbered("branch7x7x3", 4))
        for name in ("Mixed_7b", "Mixed_7c"):
            x = self._split(x, name)
        return x.mean((2, 3))

    def _conv(self, x: Tensor, name: str, stride: int = 1, padded: bool = True) -> Tensor:
        weight = self.weights[f"{name}.conv.weight"]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if padded else (0, 0)
        mean, variance, scale, shift = (
            self.weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return relu(batch_norm(conv2d(x, weight, None, stride, padding), mean, variance, scale, shift, eps=EPSILON))

    def _chain(self, x: Tensor, name: str, parts: Sequence[str]) -> Tensor:
        for part in parts:
            x = self._conv(x, f"{name}.{part}")
        return x

    def _pooled(self, x: Tensor, name: str) -> Tensor:
        return self._conv(avg_pool2d(x, 3, 1, 1), f"{name}.branch_pool")

    def _mixed(self, x: Tensor, name: str, *branches: Sequence[str]) -> Tensor:
        return torch.cat([*(self._chain(x, name, branch) for branch in branches), self._pooled(x, name)], 1)

    def _smaller(self, x: Tensor, name: str, *branches: Sequence[str]) -> Tensor:
        """Half as high and wide: the last convolution of each branch has stride 2 and no padding."""
        found = [
            self._conv(self._chain(x, name, branch[:-1]), f"{name}.{branch[-1]}", stride=2, padded=False)
            for branch in branches
        ]
        return torch.cat([*found, max_pool2d(x, 3, 2)], 1)

    def _split(self, x: Tensor, name: str) -> Tensor:
        """Two branches end in a wide and a high convolution each, side by side."""
        one, two = self._conv(x, f"{name}.branch3x3_1"), self._chain(x, name, _numbered("branch3x3dbl", 2))
        ends = [(one, "branch3x3_2a"), (one, "branch3x3_2b"), (two, "branch3x3dbl_3a"), (two, "branch3x3dbl_3b")]
        found = [self._conv(inside, f"{name}.{end}") for inside, end in ends]
        return torch.cat([self._conv(x, f"{name}.branch1x1"), *found, self._pooled(x, name)], 1)


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(1, count + 1))


def load(folder: Path) -> Inception:
    """From a folder as timm publishes it. Raises InputError where it lacks weights or its configuration the means
    and deviations."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    settings = strict_json.read_object(folder / "config.json", InputError).get("pretrained_cfg", {})
    try:
        mean, deviation = (torch.tensor(settings[name]).float().view(3, 1, 1) for name in ("mean", "std"))
        network = Inception({name: value.float() for name, value in load_file(file).items()}, mean, deviation)
        with torch.no_grad():
            network.features(torch.zeros(1, 3, SIDE, SIDE))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise InputError(f"--features {folder}: no Inception v3 as timm publishes it: {reason}") from error
    return network
