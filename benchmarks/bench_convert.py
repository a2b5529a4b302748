"""Seconds and peak memory of converting a full-size SD 1.5 checkpoint with random weights, by phase.

    python benchmarks/bench_convert.py [--folder DIR] [--attention KIND ...] [--whole]

For each attention, the UNet (859.5 M parameters, 512x512, batch 2) is converted and verified in its own process.
``--whole`` converts all components in both variants instead, as a user would. Processor seconds are printed
as well as seconds: they can be compared on a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_convert.conversion.events import Event
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.families import AttentionKind

UNET: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.10.0",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP: Mapping[str, Any] = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "num_hidden_layers": 12}
TEXT: Mapping[str, Any] = {
    **CLIP,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "vocab_size": 49408,
}
SAFETY: Mapping[str, Any] = {
    "projection_dim": 768,
    "text_config": {},
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel", UNET, "diffusion_pytorch_model.safetensors"),
    "vae": ("diffusers", "AutoencoderKL", VAE, "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("transformers", "CLIPTextModel", TEXT, "model.safetensors"),
    "safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker", SAFETY, "model.safetensors"),
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "prediction_type": "epsilon",
}


def write_checkpoint(folder: Path) -> Path:
    """A diffusers folder of SD 1.5's sizes; weights are normal with variance 1 / (3 fan-in), norms 1, biases 0."""
    import tiny_checkpoints
    from diffusion_convert.checkpoint import torch_networks
    from diffusion_convert.checkpoint.model import Submodel

    if (folder / "model_index.json").exists():
        return folder
    for name, (_, class_name, config, file) in PARTS.items():
        network = torch_networks.empty(Submodel(class_name, config, dict), name)
        write_safetensors(folder / name / file, {key: tuple(v.shape) for key, v in network.state_dict().items()})
        (folder / name / "config.json").write_text(json.dumps(config))
    tiny_checkpoints.write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {name: [library, class_name] for name, (library, class_name, _, _) in PARTS.items()}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    return folder


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Random float16 tensors, one in memory at a time: the format is a length, a JSON header and the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(random_weight(name, shape, rng).tobytes())


def random_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) == 1:
        return np.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0, np.float16)
    deviation = 1 / math.sqrt(3 * math.prod(shape[1:]))
    return (rng.standard_normal(shape, np.float32) * deviation).astype(np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/coreml-sd-bench"))  # noqa: S108
    parser.add_argument("--attention", action="append", choices=[kind.value for kind in AttentionKind])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        convert(arguments.folder, arguments.child.split(","), arguments.whole, not arguments.no_verify)
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    print(f"checkpoint: {write_checkpoint(arguments.folder / 'checkpoint')}", flush=True)
    kinds = arguments.attention or [kind.value for kind in AttentionKind]
    for chosen in ["original,split_einsum_v2"] if arguments.whole else kinds:
        flags = ["--whole"] * arguments.whole + ["--no-verify"] * arguments.no_verify
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--child", chosen, *flags]
        subprocess.run(command, check=True)


def convert(folder: Path, kinds: list[str], whole: bool, verify: bool) -> None:
    """Convert, and print what each phase took and how much memory was in use at most until its end."""
    import diffusion_convert

    output = folder / f"models-{'-'.join(kinds)}"
    shutil.rmtree(output, ignore_errors=True)
    options = ConvertOptions(
        attention=tuple(AttentionKind(kind) for kind in kinds),
        components=() if whole else ("unet",),
        compiled=False,
        verify=verify,
    )
    phases = Phases()
    diffusion_convert.convert(folder / "checkpoint", output, options, phases)
    phases.switch("")
    share = sum(seconds for name, seconds in phases.processor.items() if name.endswith(" convert"))
    print(
        f"{'whole checkpoint' if whole else 'unet'} {', '.join(kinds)}: {sum(phases.seconds.values()):.1f} s, "
        f"{sum(phases.processor.values()):.1f} s processor on {os.cpu_count()} cores, {peak_gb():.2f} GB peak; "
        f"in ct.convert {share / sum(phases.processor.values()):.0%} of the processor's time",
        flush=True,
    )
    shutil.rmtree(output)


class Phases:
    """Listens to a conversion and prints each phase as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self._name, self._since, self._processor_since = "start", time.perf_counter(), time.process_time()

    def __call__(self, event: Event) -> None:
        self.switch(f"{event.part} {event.phase}".strip())

    def switch(self, name: str) -> None:
        if name == self._name:
            return
        now, processor = time.perf_counter(), time.process_time()
        self.seconds[self._name] = now - self._since
        self.processor[self._name] = processor - self._processor_since
        print(
            f"  {self._name:<40}{now - self._since:8.1f} s {processor - self._processor_since:8.1f} s processor "
            f"{peak_gb():6.2f} GB peak",
            flush=True,
        )
        self._name, self._since, self._processor_since = name, now, processor


def peak_gb() -> float:
    """The most memory that this process has had at once, files that it has mapped included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
