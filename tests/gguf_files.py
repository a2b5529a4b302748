"""GGUF files of a UNet, as the quantising tools of node editors write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}
"""Where a block's numbers in float16 stand, of the types that the package reads and cannot write."""


def write(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    kind: str,
    architecture: str = "sdxl",
    new_rows: bool = True,
) -> Path:
    """Weights of one dimension in float32; rows that no block fits put into others, the shape kept beside, or
    without ``new_rows`` in float16."""
    writer, known = gguf.GGUFWriter(path, architecture), gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[known][0]
    for name, value in tensors.items():
        values = value.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        stored = known
        if values.shape[-1] % block:
            if values.size % block or not new_rows:
                stored = gguf.GGMLQuantizationType.F16
            else:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in values.shape])
                values = values.reshape(-1, block)
        writer.add_tensor(name, _stored(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(values: NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> NDArray[np.generic]:
    if kind.name not in _SCALES:
        return gguf.quants.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    for at in _SCALES[kind.name]:
        blocks[:, at : at + 2] = random.uniform(1e-5, 1e-4, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)
