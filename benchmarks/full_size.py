"""A full-size SD 1.5 UNet package with random weights, spread as trained ones are, to measure speed and memory
where no checkpoint may be downloaded.

    python benchmarks/full_size.py FOLDER        writes FOLDER/unet.mlpackage (1.7 GB, about two minutes)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import command_line
from diffusion_runtime.families import AttentionKind
from full_size_checkpoint import SD1_UNET, VAE, random_weight


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """float16 weights of the network: normal with variance 1 / (3 fan-in), norms at 1 and biases at 0."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(dict(config))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_weight(name, tuple(value.shape), generator) for name, value in network.state_dict().items()
    }


def full_size_unet(folder: Path, attention: AttentionKind = AttentionKind.ORIGINAL) -> Path:
    """``folder/unet.mlpackage`` (of another attention: ``unet_split_einsum….mlpackage``), made once: 512x512,
    batch 2, macOS 13."""
    from diffusion_convert.checkpoint.model import Checkpoint, Submodel
    from diffusion_convert.components.component import Shape
    from diffusion_convert.components.unet import UNET
    from diffusion_convert.export.export import ExportOptions, export
    from diffusion_runtime.bundle.manifest import Source
    from diffusion_runtime.mil.program import Metadata

    suffix = "" if attention is AttentionKind.ORIGINAL else f"_{attention.value}"
    path = folder / f"unet{suffix}.mlpackage"
    if path.exists():
        return path
    tensors = random_tensors(SD1_UNET)
    checkpoint = Checkpoint(
        name="random-sd-1.5",
        family="sd1",
        source=Source(name="random"),
        models={
            "unet": Submodel("UNet2DConditionModel", SD1_UNET, lambda: tensors, ()),
            "vae": Submodel("AutoencoderKL", VAE, dict, ()),
        },
        schedulers={},
        tokenizers={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    export_options = ExportOptions(attention, Shape(512, 512, 2), "macOS13")
    export(UNET, checkpoint, export_options, path, Metadata())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(full_size_unet(parser.parse_args().folder))


if __name__ == "__main__":
    command_line.run(main)
