"""Checkpoints in diffusers' layout, changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def configure(folder: Path, part: str, **values: Any) -> None:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
