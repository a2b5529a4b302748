"""Where in a checkpoint a LoRA's modules are: every spelling of every module of its networks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from diffusion_convert.checkpoint import ldm_mmdit
from diffusion_convert.checkpoint.diffusers_unet import ldm_modules
from diffusion_convert.checkpoint.lora.names import plain
from diffusion_convert.checkpoint.model import Checkpoint


@dataclass(frozen=True, slots=True)
class Place:
    """One module: its tensors' names and shapes by "weight" and "bias", and the UNet's block that it lies in
    ("in04", "mid", "out11"; "" in other networks and outside of blocks).

    ``part``: which of how many parts of the trainer's module this is, by rows; ``swapped``: see `ldm_mmdit.Own`."""

    block: str
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    part: tuple[int, int] = (0, 1)
    swapped: bool = False


def places(checkpoint: Checkpoint, subfolder: str) -> Mapping[str, tuple[Place, ...]]:
    """The modules of a network by every plain spelling (`names.plain`) that trainers use: one, or those that lie in
    one of Stability AI's."""
    if subfolder not in checkpoint.models:
        return {}
    tensors = checkpoint.models[subfolder].tensors()
    sgm = ldm_modules(tensors) if subfolder == "unet" else {}
    modules: dict[str, Place] = {}
    for name, value in tensors.items():
        module, _, target = name.rpartition(".")
        if target in ("weight", "bias"):
            place = modules.setdefault(module, Place(block(sgm.get(module, ""))))
            place.tensors[target] = name, tuple(value.shape)
    found = {
        spelling: (place,) for module, place in modules.items() for spelling in _spellings(module, sgm.get(module))
    }
    return found | dict(_of_mmdit(modules)) if subfolder == "transformer" else found


def _of_mmdit(modules: Mapping[str, Place]) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Stable Diffusion 3's by Stability AI's names, as kohya's trainer and node editors have them."""
    blocks = {module.split(".")[1] for module in modules if module.startswith("transformer_blocks.")}
    for name, own in ldm_mmdit.modules(len(blocks)).items():
        count = len(own.modules)
        there = [
            replace(modules[one], part=(index, count), swapped=own.swapped)
            for index, one in enumerate(own.modules)
            if one in modules
        ]
        if len(there) == count:
            yield plain(name), tuple(there)


def text_layers(found: Mapping[str, object]) -> int:
    """How many layers a text encoder has."""
    return 1 + max((int(layer[1]) for name in found if (layer := TEXT_LAYER.match(name))), default=-1)


TEXT_LAYER = re.compile(r"encoder_layers_(\d+)_")
"""The number of the layer that a text encoder's module (`names.plain`) is in."""


def _spellings(module: str, sgm: str | None) -> Iterator[str]:
    name = plain(module)
    yield name
    if sgm is not None:
        yield plain(sgm)
    if name.endswith("_to_out_0"):  # diffusers' attention processors had no dropout to count
        yield name.removesuffix("_0")
    if (projection := re.fullmatch(r"(.*self_attn)_(q|k|v|out)_proj", name)) is not None:
        yield f"{projection[1]}_to_{projection[2]}"  # and gave the text encoder's layers their own names


def block(sgm: str) -> str:
    """The block of a UNet's module, by its sgm name: "in00" … "mid" … "out11", "" outside of them."""
    if sgm.startswith("middle_block."):
        return "mid"
    found = re.match(r"(in|out)put_blocks\.(\d+)\.", sgm + ".")
    return f"{found[1]}{int(found[2]):02}" if found is not None else ""
