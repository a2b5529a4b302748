"""Where in a checkpoint a LoRA's modules are: every spelling of every module of its networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from diffusion_convert.checkpoint.lora.names import plain
from diffusion_convert.checkpoint.model import Checkpoint


@dataclass(frozen=True, slots=True)
class Place:
    """One module: its tensors' names and shapes by "weight" and "bias", and the UNet's block that it lies in
    ("in04", "mid", "out11"; "" in other networks and outside of blocks)."""

    block: str
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


def places(checkpoint: Checkpoint, subfolder: str) -> Mapping[str, Place]:
    """The modules of a network by every plain spelling (`names.plain`) that trainers use."""
    if subfolder not in checkpoint.models:
        return {}
    tensors = checkpoint.models[subfolder].tensors()
    sgm = sgm_names(tensors) if subfolder == "unet" else {}
    modules: dict[str, Place] = {}
    for name, value in tensors.items():
        module, _, target = name.rpartition(".")
        if target in ("weight", "bias"):
            place = modules.setdefault(module, Place(block(sgm.get(module, ""))))
            place.tensors[target] = name, tuple(value.shape)
    return {
        spelling: place for module, place in modules.items() for spelling in _spellings(module, sgm.get(module))
    }


def text_layers(found: Mapping[str, Place]) -> int:
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


_SGM: tuple[tuple[str, str], ...] = (
    (r"conv_in", "input_blocks.0.0"),
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"add_embedding\.linear_1", "label_emb.0.0"),
    (r"add_embedding\.linear_2", "label_emb.0.2"),
    (r"conv_norm_out", "out.0"),
    (r"conv_out", "out.2"),
    (r"mid_block\.resnets\.0\.(.+)", r"middle_block.0.\1"),
    (r"mid_block\.attentions\.0\.(.+)", r"middle_block.1.\1"),
    (r"mid_block\.resnets\.1\.(.+)", r"middle_block.2.\1"),
)
"""diffusers' names of a UNet's modules -> Stability AI's (sgm), outside of the blocks down and up."""
_SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def sgm_names(tensors: Iterable[str]) -> dict[str, str]:
    """Of a UNet's tensors' names: Stability AI's names of the modules, which kohya's trainer writes for SDXL, by
    diffusers' names. Blocks are counted, not assumed: distilled UNets have fewer layers."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    found = [(module, block) for module in modules if (block := _BLOCK.fullmatch(module)) is not None]
    sizes: dict[tuple[str, int], set[tuple[bool, int]]] = {}
    attended = set()
    for _, block in found:
        side, number, inner, index = block[1], int(block[2]), block[3], int(block[4])
        if inner == "resnets" or inner == "downsamplers":  # each is an input block of its own
            sizes.setdefault((side, number), set()).add((inner == "resnets", index))
        if inner == "attentions":
            attended.add((side, number))
    names = {}
    for module, block in found:
        side, number, inner, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        before = sum(len(size) for (other, n), size in sizes.items() if other == side and n < number)
        own = len(sizes.get((side, number), ()))
        if inner == "downsamplers":
            names[module] = f"input_blocks.{before + own}.0.{rest.replace('conv', 'op')}"
        elif inner == "upsamplers":
            names[module] = f"output_blocks.{before + own - 1}.{1 + ((side, number) in attended)}.{rest}"
        else:
            start = f"input_blocks.{1 + before + index}" if side == "down" else f"output_blocks.{before + index}"
            names[module] = f"{start}.{int(inner == 'attentions')}.{_sgm_inner(inner, rest)}"
    for module in modules:
        for pattern, replacement in _SGM:
            if (match := re.fullmatch(pattern, module)) is not None:
                names[module] = match.expand(replacement)
    return {module: re.sub(r"^(middle_block\.[02]\.)(.+)", _middle, name) for module, name in names.items()}


def _middle(match: re.Match[str]) -> str:
    return match[1] + _SGM_RESNET.get(match[2], match[2])


def _sgm_inner(inner: str, rest: str) -> str:
    return _SGM_RESNET.get(rest, rest) if inner == "resnets" else rest


def block(sgm: str) -> str:
    """The block of a UNet's module, by its sgm name: "in00" … "mid" … "out11", "" outside of them."""
    if sgm.startswith("middle_block."):
        return "mid"
    found = re.match(r"(in|out)put_blocks\.(\d+)\.", sgm + ".")
    return f"{found[1]}{int(found[2]):02}" if found is not None else ""
